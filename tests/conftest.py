"""Shared ground of the tests: the committed sample, its CLIP, a small random CLIP on disk, and real material where present."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from bsap_utils import ROOT
from bsap_utils.datasets import load_refer
from bsap_utils.regions import ground_truth, load_candidates, pair_up

os.environ["BSAP_CACHE"] = ""  # every test encodes for itself; those of the cache give it a folder of their own
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "notebooks"))  # `run` and `render` stand beside the notebooks


@pytest.fixture(scope="session", autouse=True)
def repository_root():
    """Relative paths (also those of doctests) are read from the repository root."""
    os.chdir(ROOT)


@pytest.fixture(scope="session")
def sample():
    return load_refer("data/refshapes", "refshapes")


@pytest.fixture(scope="session")
def sample_val(sample):
    return sample.select(split="val")


@pytest.fixture(scope="session")
def few(sample):
    """Five images, whose `regions` are their ground truth."""
    return sample.select(split="val", limit=5)


@pytest.fixture(scope="session")
def regions(few):
    return ground_truth(few)


@pytest.fixture(scope="session")
def detections(sample_val):
    return load_candidates(sample_val, "detections", "data/refshapes")


@pytest.fixture(scope="session")
def scorer():
    from bsap_utils.scoring import ClipScorer

    return ClipScorer("local-dir:data/clip-refshapes", device="cpu", cache=False)


@pytest.fixture(scope="session")
def val_case(sample_val, detections, scorer):
    """Val of the sample with detections, scored: ds, candidates, pairs, image [V, C, D], s [P], a [C, M] (categories)."""
    pairs = pair_up(sample_val, detections)
    image = scorer.encode_regions(sample_val, detections)
    text = scorer.encode_texts(sample_val.expressions["text"].tolist())
    bank = scorer.encode_texts([f"a photo of {name}" for name in sample_val.categories])
    s, a = scorer.pair_logits(image, text, pairs), scorer.logits(image, bank)
    return SimpleNamespace(ds=sample_val, candidates=detections, pairs=pairs, image=image, s=s, a=a)


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"shared/{name} lies beside the checkout of the project's own machines only")
    return SHARED / name


@pytest.fixture(scope="session")
def photos() -> Path:
    return _shared("coco-photos")


@pytest.fixture(scope="session")
def real_photos() -> Path:
    """Nine COCO photographs with all their objects and true expressions, in the UNC layout."""
    return _shared("real/refcoco-photos")


@pytest.fixture(scope="session")
def real_expressions() -> Path:
    """The true expressions and boxes of the eight evaluation splits, as JSON lists."""
    return _shared("real/refcoco-expressions")


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def save_clip(tmp_path_factory):
    """Save a small random CLIP as a `local-dir:` folder; keyword arguments go to open_clip's model class."""

    def save(weights: bool = True, **changes) -> Path:
        folder = tmp_path_factory.mktemp("clip")
        config = {**json.loads(json.dumps(TINY)), **changes}
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**config)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        if weights:
            state = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_file(state, folder / "open_clip_model.safetensors")
        return folder

    return save


@pytest.fixture
def english_model(tmp_path, monkeypatch):
    """A real spaCy model, trained here on a few sentences and installed as a package: they are all that it knows."""
    spacy = pytest.importorskip("spacy")
    from spacy.training import Example

    def install(sentences):  # words, parts of speech, heads, dependencies
        spacy.util.fix_random_seed(0)
        nlp = spacy.blank("en")
        nlp.add_pipe("morphologizer")
        nlp.add_pipe("parser", config={"min_action_freq": 1})
        examples = []
        for words, pos, heads, deps in sentences:
            annotation = {"words": words.split(), "pos": pos.split(), "heads": heads, "deps": deps.split()}
            examples.append(Example.from_dict(nlp.make_doc(words), annotation))
        optimizer = nlp.initialize(lambda: examples)
        for _ in range(40):
            nlp.update(examples, sgd=optimizer)
        nlp.meta.update(lang="en", name="core_web_md", version="0.1.0")
        package, record = tmp_path / "en_core_web_md", tmp_path / "en_core_web_md-0.1.0.dist-info"
        package.mkdir()
        nlp.to_disk(package / "en_core_web_md-0.1.0")
        shutil.copy(package / "en_core_web_md-0.1.0" / "meta.json", package)
        load = "from spacy.util import load_model_from_init_py\n"
        load += "def load(**o): return load_model_from_init_py(__file__, **o)\n"
        (package / "__init__.py").write_text(load)
        record.mkdir()
        (record / "METADATA").write_text("Metadata-Version: 2.1\nName: en_core_web_md\nVersion: 0.1.0\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "en_core_web_md", raising=False)  # an earlier test's

    return install
