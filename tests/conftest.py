"""Shared ground of the tests: the committed sample, a small random CLIP on disk, and the real photo where it is present."""

import json
import os
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from bsap_utils import ROOT
from bsap_utils.datasets import load_refer
from bsap_utils.scoring import ClipScorer

os.environ["BSAP_CACHE"] = ""  # every test encodes for itself; those of the cache give it a folder of their own
PHOTOS = ROOT.parent / "shared" / "coco-photos"


@pytest.fixture(scope="session", autouse=True)
def repository_root():
    """Relative paths (also those of doctests) are read from the repository root."""
    os.chdir(ROOT)


@pytest.fixture(scope="session")
def sample():
    return load_refer("data/refshapes", "refshapes")


@pytest.fixture(scope="session")
def scorer():
    return ClipScorer("local-dir:data/clip-refshapes", device="cpu")


@pytest.fixture(scope="session")
def photos() -> Path:
    if not PHOTOS.is_dir():
        pytest.skip("the real photo lies beside the checkout of the project's own machines only")
    return PHOTOS


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
            save_file(
                {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
            )
        return folder

    return save
