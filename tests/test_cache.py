"""The feature cache: what is found again, what is not, and what becomes of damage."""

import dataclasses
import subprocess
import sys
import warnings

import pytest
import torch

from bsap_utils import ROOT, cache, scoring
from bsap_utils import visual_prompts as vp
from bsap_utils.proposals import from_masks, ground_truth
from bsap_utils.scoring import ClipScorer, refer_logits


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("BSAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def few(sample):
    return sample.select(split="val", limit=5)


@pytest.fixture
def counted(save_clip, kept):
    """Make scorers of one model; `.images` and `.texts` count what they encode."""
    model = f"local-dir:{save_clip()}"

    def make(**changes):
        scorer = ClipScorer(model, device="cpu", **changes)
        scorer.images, scorer.texts = 0, 0
        image, text = scorer.model.encode_image, scorer.model.encode_text

        def encode_image(pixels):
            scorer.images += len(pixels)
            return image(pixels)

        def encode_text(tokens):
            scorer.texts += len(tokens)
            return text(tokens)

        scorer.model.encode_image, scorer.model.encode_text = encode_image, encode_text
        return scorer

    return make


def test_a_second_run_encodes_nothing_and_gives_the_same_bits(few, counted):
    regions = ground_truth(few)
    first, second = counted(), counted()
    logits = [refer_logits([scorer], few, regions, ["star", "key"]) for scorer in (first, second)]
    assert first.images == 2 * len(regions) and first.texts > 2
    assert (second.images, second.texts) == (0, 0)
    assert torch.equal(logits[0].query.nan_to_num(), logits[1].query.nan_to_num())
    assert torch.equal(logits[0].aux, logits[1].aux)


def test_the_same_region_twice(few, counted):
    regions = ground_truth(few)
    regions = regions.loc[[*regions.index, *regions.index[:3]]].reset_index(drop=True)
    expected = counted().encode_regions(few, regions, ["crop"])
    for scorer in (counted(), counted()):
        assert torch.equal(scorer.encode_regions(few, regions, ["crop"]), expected) and scorer.images == 0


def test_only_what_is_new_is_encoded(few, counted):
    regions = ground_truth(few)
    shuffled = regions.sample(frac=1, random_state=0)
    counted().encode_regions(few, shuffled.head(10), ("blur",))
    scorer = counted()
    features = scorer.encode_regions(few, regions, ("crop", "blur"))
    assert scorer.images == 2 * len(regions) - 10
    assert torch.allclose(features, counted(cache=False).encode_regions(few, regions, ("crop", "blur")), atol=1e-6)
    texts = counted()
    texts.encode_texts(["star", "mug"])
    again = counted()
    again.encode_texts(["key", "star"])
    assert again.texts == 1


@pytest.mark.parametrize("what", ["box", "picture", "prompt", "weights", "precision", "exact", "mask"])
def test_whatever_changes_features_is_another_key(what, few, counted, tmp_path, save_clip):
    prompts, regions, ds, changes = ["crop"], ground_truth(few), few, {}
    if what == "picture":
        for name in few.images["file_name"]:
            (tmp_path / "images").mkdir(exist_ok=True)
            (tmp_path / "images" / name).write_bytes((few.image_root / name).read_bytes())
        ds = dataclasses.replace(few, image_root=tmp_path / "images")
    if what == "mask":
        prompts = ["mask_crop"]
    counted().encode_regions(ds, regions, prompts)
    if what == "box":
        regions = regions.assign(w=regions["w"] * 0.9)
    if what == "picture":
        for path in (tmp_path / "images").glob("*.jpg"):
            path.write_bytes(path.read_bytes() + b" ")
    if what == "prompt":
        prompts = ["circle"]
    if what == "precision":
        changes = {"precision": "bf16"}
    if what == "mask":
        other = from_masks(few, ROOT / "data/refshapes/refshapes_masks.json")["segmentation"]
        regions = regions.assign(segmentation=other.head(len(regions)).to_numpy())
    scorer = counted(**changes)
    if what == "weights":
        with torch.no_grad():
            next(scorer.model.parameters()).add_(1e-3)
    scorer.encode_regions(ds, regions, prompts, exact=what == "exact")
    assert scorer.images == len(regions)


def test_the_code_of_a_view_is_part_of_the_key(few, counted, monkeypatch):
    regions = ground_truth(few)
    counted().encode_regions(few, regions, ["crop"])
    monkeypatch.setattr(scoring.inspect, "getsource", lambda thing: "another version")
    scorer = counted()
    scorer.encode_regions(few, regions, ["crop"])
    assert scorer.images == len(regions)


def test_a_prompt_of_ones_own_is_not_kept(few, counted, monkeypatch):
    monkeypatch.setitem(vp.VISUAL_PROMPTS, "mine", lambda image, boxes, masks: image.expand(len(boxes), -1, -1, -1))
    for scorer in (counted(), counted()):
        scorer.encode_regions(few, ground_truth(few), ["mine"])
        assert scorer.images == len(ground_truth(few))


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
@pytest.mark.parametrize("damage", ["bit", "short", "gone"])
def test_damage_is_said_mended_and_forgotten(kind, damage, few, counted, kept):
    regions = ground_truth(few)
    expected = counted().encode_regions(few, regions, ["crop"])
    (file,) = kept.rglob(f"*.{kind}")
    content = bytearray(file.read_bytes())
    content[150 if kind == "parquet" else len(content) // 2] ^= 255  # among the keys, or the features
    file.write_bytes(content) if damage == "bit" else file.write_bytes(
        content[:40]
    ) if damage == "short" else file.unlink()
    scorer = counted()
    if (kind, damage) == ("parquet", "gone"):  # features that no index names are nobody's
        assert torch.allclose(scorer.encode_regions(few, regions, ["crop"]), expected, atol=1e-6)
    else:
        with pytest.warns(UserWarning, match="damaged"):
            assert torch.allclose(scorer.encode_regions(few, regions, ["crop"]), expected, atol=1e-6)
    assert scorer.images == len(regions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        last = counted()
        last.encode_regions(few, regions, ["crop"])
    assert last.images == 0


def test_an_interrupted_run_goes_on(few, counted, monkeypatch):
    regions, scorer = ground_truth(few), counted(batch_size=1)
    encode = scorer.model.encode_image

    def interrupted(pixels):
        if scorer.images >= 30:
            raise KeyboardInterrupt
        return encode(pixels)

    scorer.model.encode_image = interrupted
    with pytest.raises(KeyboardInterrupt):
        scorer.encode_regions(few, regions, ["crop"])
    rest = counted()
    rest.encode_regions(few, regions, ["crop"])
    assert 0 < rest.images < len(regions)


def test_a_long_run_keeps_what_it_has_as_it_goes(few, counted, kept, monkeypatch):
    monkeypatch.setattr(scoring, "KEEP_EVERY", 0)
    counted(batch_size=1).encode_regions(few, ground_truth(few), ["crop"])
    assert len(list(kept.rglob("*.safetensors"))) > 1
    again = counted()
    again.encode_regions(few, ground_truth(few), ["crop"])
    assert again.images == 0


ENCODE = """
import sys
from bsap_utils.datasets import load_refer
from bsap_utils.proposals import ground_truth
from bsap_utils.scoring import ClipScorer
ds = load_refer("data/refshapes", "refshapes").select(split="val", limit=20)
ClipScorer(sys.argv[1], device="cpu").encode_regions(ds, ground_truth(ds))
"""


def test_two_runs_at_once_leave_a_whole_cache(sample, counted):
    scorer = counted()
    command = [sys.executable, "-W", "error::UserWarning", "-c", ENCODE, scorer.model_name]
    runs = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        errors = run.communicate()[1]
        assert run.returncode == 0, errors
    ds = sample.select(split="val", limit=20)
    scorer.encode_regions(ds, ground_truth(ds))
    assert scorer.images == 0


def test_a_cache_that_cannot_be_written_stops_nothing(few, counted, kept):
    kept.write_text("a file, where the folder should be")
    with pytest.warns(UserWarning, match="could not be kept.*BSAP_CACHE"):
        assert counted().encode_regions(few, ground_truth(few), ["crop"]).isfinite().all()


def test_usage_and_clear(few, counted, kept):
    assert cache.usage() == (0, 0) == cache.clear()
    counted().encode_regions(few, ground_truth(few), ["crop"])
    (kept / "notes.txt").write_text("mine")
    files, size = cache.usage()
    assert files == 4 and size > 1000
    assert cache.clear()[0] == 3 and cache.usage() == (1, 4), "what is not the cache's stays"
    again = counted()
    again.encode_regions(few, ground_truth(few), ["crop"])
    assert again.images


def test_bsap_cache_clear_says_what_it_did(few, counted, kept):
    counted().encode_regions(few, ground_truth(few), ["crop"])
    command = [sys.executable, "-m", "bsap_utils.cli", "cache", "clear"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"3 files with 0.0 MB deleted from {kept}" in done.stdout, done.stderr
    assert cache.usage() == (0, 0)


def test_without_a_folder_nothing_is_kept(few, counted, monkeypatch, tmp_path):
    monkeypatch.setenv("BSAP_CACHE", "")
    for scorer in (counted(), counted()):
        scorer.encode_texts(["star"])
        assert scorer.texts == 1
    assert cache.folder() is None and cache.usage() == (0, 0)
