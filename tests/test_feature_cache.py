"""Features on disk: what is found again, what is not, what becomes of damage, and that nothing else is touched."""

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from click.testing import CliRunner

from bsap_utils import ROOT, datasets, scoring
from bsap_utils import visual_prompts as vp
from bsap_utils.cli import app
from bsap_utils.regions import from_masks, ground_truth, load_candidates, pair_up
from bsap_utils.scoring import ClipScorer


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("BSAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    candidates = load_candidates(few, "detections", "data/refshapes")
    pairs, first, second = pair_up(few, candidates), counted(), counted()

    def run(scorer):
        text = scorer.encode_texts(few.expressions["text"], "a photo of {}")
        return scorer.pair_logits(scorer.encode_regions(few, candidates), text, pairs)

    assert torch.equal(run(first), run(second))
    assert first.images == 2 * len(candidates) and first.texts > 2
    assert (second.images, second.texts) == (0, 0)


def test_a_file_a_prompt_and_group_of_images(few, regions, counted, kept):
    counted(batch_size=4).encode_regions(few, regions, ["crop", "blur"])
    assert len(list(kept.iterdir())) == 2
    many = regions.loc[regions.index.repeat(10)].reset_index(drop=True)  # ten times the same: 10 times the views
    many["w"] *= torch.linspace(0.5, 1, len(many)).numpy()
    counted(batch_size=4).encode_regions(few, many, ["crop"])
    assert len(list(kept.iterdir())) > 3


def test_the_same_region_twice(few, regions, counted):
    twice = regions.loc[[*regions.index, *regions.index[:3]]].reset_index(drop=True)
    expected = counted().encode_regions(few, twice, ["crop"])
    scorer = counted()
    assert torch.equal(scorer.encode_regions(few, twice, ["crop"]), expected) and scorer.images == 0


def test_only_what_is_new_is_encoded(few, regions, counted):
    counted().encode_regions(few, regions.sample(frac=1, random_state=0).head(10), ("blur",))
    scorer = counted()
    features = scorer.encode_regions(few, regions, ("crop", "blur"))
    assert scorer.images == 2 * len(regions) - 10
    assert torch.allclose(features, counted(cache=False).encode_regions(few, regions, ("crop", "blur")), atol=1e-6)
    counted().encode_texts(["star", "mug"])
    again = counted()
    again.encode_texts(["key", "star"])
    assert again.texts == 1


@pytest.mark.parametrize("what", ["box", "picture", "prompt", "weights", "precision", "mask", "weight", "code"])
def test_whatever_changes_features_is_another_key(what, few, regions, counted, tmp_path, monkeypatch):
    shutil.copytree(few.image_root, tmp_path / "images")
    ds, changes, options = dataclasses.replace(few, image_root=tmp_path / "images"), {}, {}
    prompts = {"mask": ["mask_crop"], "weight": ["global_local"]}.get(what, ["crop"])
    counted().encode_regions(ds, regions, prompts)
    if what == "box":
        regions = regions.assign(w=regions["w"] * 0.9)
    if what == "picture":  # another one of equal length and time
        names = [tmp_path / "images" / name for name in few.images["file_name"]]
        for path, other in zip(names, [*names[1:], names[0]], strict=True):
            times, content = path.stat(), (few.image_root / other.name).read_bytes()
            path.write_bytes(content.ljust(times.st_size, b" ")[: max(len(content), times.st_size)])
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if what == "prompt":
        prompts = ["circle"]
    if what == "precision":
        changes = {"precision": "bf16"}
    if what == "mask":
        other = from_masks(few, ROOT / "data/refshapes/refshapes_masks.json")["segmentation"]
        regions = regions.assign(segmentation=other.head(len(regions)).to_numpy())
    if what == "weight":
        options = {"global_weight": 0.5}
    if what == "code":
        monkeypatch.setattr(scoring.inspect, "getsource", lambda thing: "another version")
    scorer = counted(**changes)
    if what == "weights":
        with torch.no_grad():
            next(scorer.model.parameters()).add_(1e-3)
    scorer.encode_regions(ds, regions, prompts, **options)
    assert scorer.images == len(regions)


def test_a_picture_that_moved_is_found_again(few, regions, counted, tmp_path):
    counted().encode_regions(few, regions)
    shutil.copytree(few.image_root, tmp_path / "elsewhere")
    scorer = counted()
    scorer.encode_regions(dataclasses.replace(few, image_root=tmp_path / "elsewhere"), regions)
    assert scorer.images == 0


def test_a_prompt_of_ones_own_is_not_kept(few, regions, counted, monkeypatch):
    ours = vp.whole(vp.box_masks, outside=lambda image: image // 2)  # made with a function of the package
    for prompt in (lambda image, boxes, masks: image.expand(len(boxes), -1, -1, -1), ours):
        monkeypatch.setitem(vp.VISUAL_PROMPTS, "mine", prompt)
        for scorer in (counted(), counted()):
            scorer.encode_regions(few, regions, ["mine"])
            assert scorer.images == len(regions)


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "foreign"])
@pytest.mark.parametrize("read_only", [False, True])
def test_damage_is_said_and_encoded_again(damage, read_only, few, regions, counted, kept, monkeypatch):
    expected = counted().encode_regions(few, regions, ["crop"])
    (file,) = kept.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes({"bit": content, "short": content[:40], "empty": b"", "foreign": b"{}" * 99}[damage])
    if read_only:  # root may write anywhere, so it is said here

        def refuse(*_, **__):
            raise PermissionError("read-only")

        monkeypatch.setattr("pathlib.Path.unlink", refuse)
        monkeypatch.setattr(datasets.os, "replace", refuse)
    scorer = counted()
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.allclose(scorer.encode_regions(few, regions, ["crop"]), expected, atol=1e-6)
    assert scorer.images == len(regions)
    assert (scoring.digest(file.read_bytes()) == file.stem[33:]) != read_only, (
        "removed and written anew, where that may be"
    )
    if not read_only:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            last = counted()
            last.encode_regions(few, regions, ["crop"])
        assert last.images == 0


@pytest.mark.parametrize("error", [MemoryError("none left"), PermissionError("not yours"), OSError("disk")])
def test_a_file_that_cannot_be_read_now_is_left(error, few, regions, counted, kept, monkeypatch):
    expected = counted().encode_regions(few, regions, ["crop"])
    (file,) = kept.iterdir()
    read = type(file).read_bytes

    def fail(path):
        if path.suffix == ".safetensors":
            raise error
        return read(path)

    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="damaged or unreadable"):
        patched.setattr("pathlib.Path.read_bytes", fail)
        assert torch.allclose(counted().encode_regions(few, regions, ["crop"]), expected, atol=1e-6)
    again = counted()
    again.encode_regions(few, regions, ["crop"])
    assert again.images == 0 and file.exists()


def test_what_is_not_a_number_never_counts_as_known(kept):
    features = torch.tensor([[1.0, 0.0], [torch.nan, 1.0], [torch.inf, 0.0]])
    keys = [scoring.digest(one) for one in "abc"]
    scoring.keep_features("a" * 32, keys, features)
    assert scoring.find_features("a" * 32, keys, 2).isnan().any(1).tolist() == [False, True, True]
    assert scoring.find_features("b" * 32, keys, 2).isnan().all() and scoring.find_features("", keys, 2).isnan().all()


def test_an_interrupted_run_goes_on_from_the_groups_done(sample, counted, monkeypatch):
    ds = sample.select(split="val", limit=100)
    regions, scorer = ground_truth(ds), counted()
    encode = scorer.model.encode_image

    def interrupted(pixels):
        if scorer.images >= 400:
            raise KeyboardInterrupt
        return encode(pixels)

    scorer.model.encode_image = interrupted
    with pytest.raises(KeyboardInterrupt):
        scorer.encode_regions(ds, regions, ["crop"])
    rest = counted()
    rest.encode_regions(ds, regions, ["crop"])
    assert len(regions) - 400 < rest.images < len(regions)


ENCODE = """
import sys
from bsap_utils.datasets import load_refer
from bsap_utils.regions import ground_truth
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


def test_a_cache_that_cannot_be_written_stops_nothing(few, regions, counted, kept):
    kept.write_text("a file, where the folder should be")
    with pytest.warns(UserWarning, match="could not be kept.*BSAP_CACHE"):
        assert counted().encode_regions(few, regions, ["crop"]).isfinite().all()


def test_clearing_deletes_our_files_only_and_follows_no_link(few, regions, counted, kept, tmp_path):
    assert not scoring.cache_files()
    counted().encode_regions(few, regions, ["crop"])
    (ours,) = kept.iterdir()
    (kept / f".{ours.stem}.123.part.safetensors").write_bytes(b"unfinished")
    precious = tmp_path / "precious"
    precious.mkdir()
    shutil.copy(ours, precious)
    (kept / "sub").symlink_to(precious)
    (kept / ("0" * 32 + "-" + "1" * 32 + ".safetensors")).symlink_to(precious / ours.name)
    others = ["model.safetensors", "notes.txt", "a.json", "b.parquet"]
    for name in others:
        (kept / name).write_text("mine")
    assert len(scoring.cache_files()) == 2
    assert CliRunner().invoke(app, ["cache", "clear"]).output == "2 files deleted\n"
    assert not scoring.cache_files()
    assert (precious / ours.name).exists() and {*others, "sub"} < {path.name for path in kept.iterdir()}
    again = counted()
    again.encode_regions(few, regions, ["crop"])
    assert again.images == len(regions)


def test_a_shard_that_is_a_link_is_neither_read_nor_written_through(few, regions, counted, kept, tmp_path):
    counted().encode_regions(few, regions, ["crop"])
    (ours,) = kept.iterdir()
    shutil.move(ours, tmp_path / "target")
    (tmp_path / "target").write_text("precious")
    ours.symlink_to(tmp_path / "target")
    with pytest.warns(UserWarning, match="could not be kept"):
        counted().encode_regions(few, regions, ["crop"])
    assert (tmp_path / "target").read_text() == "precious"


def test_without_a_folder_nothing_is_kept(counted, monkeypatch):
    monkeypatch.setenv("BSAP_CACHE", "")
    for scorer in (counted(), counted()):
        scorer.encode_texts(["star", "key"])
        assert scorer.texts == 2
    assert scoring.cache_folder() == "" and not scoring.cache_files()


def test_large_pictures_are_encoded_a_few_at_a_time(few, regions, counted, monkeypatch):
    """What `ahead` holds is bounded in pixels too: 2**26 of them, and the next as many."""
    held, whole = [], scoring.ahead
    monkeypatch.setattr(scoring, "ahead", lambda function, groups: whole(function, held.append(groups) or groups))
    large = dataclasses.replace(few, images=few.images.assign(width=8000, height=4000))
    monkeypatch.setattr(scoring, "read_image", lambda ds, image_id, device: torch.zeros(3, 300, 400, dtype=torch.uint8))
    counted(cache=False).encode_regions(large, regions, ["crop"])
    assert [len(group) for group in held[-1]] == [3, 2]
