"""Embedding at scale: real pictures, parquet and tars, a process that is killed, and a local Ray."""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bsap_utils import ROOT, embedding
from bsap_utils.aux_prompts import auxiliary_prompts
from bsap_utils.embedding import embed, read_features
from bsap_utils.scoring import ClipScorer


def picture(number: int, size=(40, 30)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


IMAGES = {f"{number:04d}": encoded(picture(number)) for number in range(6)}


def folder_of(root: Path, images: dict[str, bytes]) -> Path:
    for name, content in images.items():
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def parquet_of(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


@pytest.fixture(scope="module")
def clip(save_clip) -> str:
    return f"local-dir:{save_clip()}"


@pytest.fixture
def run(tmp_path, clip):
    def embed_here(source, out="out", **options):
        return embed(source, tmp_path / out, clip, **{"bank": "generic", "local": True} | options)

    return embed_here


def by_id(out: Path) -> dict[str, np.ndarray]:
    ids, features, _ = read_features(out)
    return dict(zip(ids, features.numpy(), strict=True))


def errors(out: Path) -> list[dict]:
    return pq.read_table(out / "errors.parquet").to_pylist()


def test_features_and_bias_are_those_of_the_scorer(run, tmp_path, clip, monkeypatch):
    monkeypatch.setattr(embedding, "ROWS", 4)
    assert run(folder_of(tmp_path / "source", IMAGES), temperature=2.0) == {"images": 6, "errors": 0}
    ids, features, bias = read_features(tmp_path / "out")
    assert ids == [f"{name}.png" for name in IMAGES] and features.dtype == bias.dtype == torch.float32
    scorer = ClipScorer(clip, device="cpu")
    expected = scorer.encode_images([picture(number) for number in range(6)])
    torch.testing.assert_close(features, expected, atol=2e-6, rtol=0)
    texts = [f"a photo of {text.lower()}" for text in auxiliary_prompts("generic")]
    logits = (scorer.logit_scale * expected @ scorer.encode_texts(texts).T).double().numpy()
    np.testing.assert_allclose(bias, 2 * np.log(np.exp(logits / 2).mean(1)), atol=1e-4)
    auxiliary = pq.read_table(tmp_path / "out" / "auxiliary.parquet")
    assert auxiliary["text"].to_pylist() == texts
    np.testing.assert_allclose(np.stack(auxiliary["feature"].to_numpy()), scorer.encode_texts(texts), atol=1e-6)
    assert json.loads((tmp_path / "out/embedding.json").read_text())["weights"] == scorer.weights_hash


def test_the_same_images_in_every_layout(run, tmp_path):
    names, contents = list(IMAGES), list(IMAGES.values())
    run(folder_of(tmp_path / "folder", {f"a/b {name}": content for name, content in IMAGES.items()}), "of folder")
    sources = {
        "tars": tar_of(tmp_path / "tars/0.tar", {f"{n}.png": c for n, c in IMAGES.items()} | {"0001.json": b"{}"}),
        "bytes": parquet_of(tmp_path / "bytes.parquet", id=names, bytes=contents, caption=names),
        "struct": parquet_of(tmp_path / "hf.parquet", image=[{"bytes": c, "path": "x"} for c in contents], key=names),
        "numbered": parquet_of(tmp_path / "numbered.parquet", image=contents),
    }
    expected = by_id(tmp_path / "of folder")
    assert list(expected) == [f"a/b {name}.png" for name in names]
    for name, source in sources.items():
        assert run(source.parent if name == "tars" else source, f"of {name}")["images"] == 6
        found = by_id(tmp_path / f"of {name}")
        assert list(found) == (names if name != "numbered" else [f"numbered-{row:09d}" for row in range(6)])
        np.testing.assert_allclose(np.stack([*found.values()]), np.stack([*expected.values()]), atol=2e-6)
        assert run(source.parent if name == "tars" else source, f"of {name}")["images"] == 0


def test_ids_of_every_kind(run, tmp_path):
    pictures = list(IMAGES.values())[:3]
    for name, ids in {
        "whole": [1.0, 2.0, 581857.0],
        "null": ["a", None, "c"],
        "bytes": [b"a", b"caf\xe9", b"c"],
    }.items():
        run(parquet_of(tmp_path / f"{name}.parquet", id=ids, image=pictures), f"out-{name}")
    assert list(by_id(tmp_path / "out-whole")) == ["1", "2", "581857"]
    assert list(by_id(tmp_path / "out-null")) == ["a", "null-000000001", "c"]
    assert list(by_id(tmp_path / "out-bytes")) == ["a", "caf\\xe9", "c"]


def test_names_that_are_not_utf8_survive_every_run(run, tmp_path):
    source = folder_of(tmp_path / "source", {"good": IMAGES["0000"]})
    Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.png")).write_bytes(IMAGES["0001"])
    assert run(source)["images"] == 2 and run(source)["images"] == 0
    assert set(by_id(tmp_path / "out")) == {"good.png", "caf\\xe9.png"}


def test_hidden_and_other_files_are_left_out_and_linked_files_are_not(run, tmp_path, capsys):
    source, disk = folder_of(tmp_path / "photos", {"one": IMAGES["0000"]}), tmp_path / "disk"
    folder_of(disk, {"a": IMAGES["0001"]})
    (source / "2020").mkdir()
    (source / "2020/a.png").symlink_to(disk / "a.png")
    (source / "gone.png").symlink_to(disk / "gone.png")
    (disk / "loop").symlink_to(source)
    (source / "self").symlink_to(source)
    for hidden in (".ipynb_checkpoints/one-checkpoint", ".thumbnails/one", "__MACOSX/one", "@eaDir/one", ".hidden"):
        folder_of(source, {hidden: IMAGES["0003"]})
    (source / "notes.txt").write_text("x")
    assert run(source)["images"] == 2
    assert set(by_id(tmp_path / "out")) == {"one.png", "2020/a.png"}
    assert "2 files to read, 0 pictures done, left aside: " in capsys.readouterr().out


def test_a_picture_replaced_in_place_is_made_again_and_the_rest_is_not(run, tmp_path):
    source = folder_of(tmp_path / "source", IMAGES)
    run(source)
    before = by_id(tmp_path / "out")
    (source / "0002.png").write_bytes(IMAGES["0005"] + b"\0")
    assert run(source)["images"] == 1
    after = by_id(tmp_path / "out")
    assert len(read_features(tmp_path / "out")[0]) == 6
    np.testing.assert_allclose(after["0002.png"], before["0005.png"], atol=1e-6)
    assert run(source)["images"] == 0


def test_broken_pictures_members_and_files_cost_themselves_only(run, tmp_path):
    source = folder_of(tmp_path / "source", {"good": IMAGES["0000"], "cut": IMAGES["0001"][:60], "empty": b""})
    (source / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    os.mkfifo(source / "fifo.png")
    tar_of(source / "half.tar", {f"t{n}.png": c for n, c in IMAGES.items()})
    content = bytearray((source / "half.tar").read_bytes())
    with tarfile.open(source / "half.tar") as archive:
        second, third = (archive.getmembers()[n].offset for n in (1, 2))
    content[second : second + 512] = b"\xff" * 512  # a header
    content[third + 512 : third + 1024] = b"\xff" * 512  # a picture
    (source / "half.tar").write_bytes(content)
    parquet_of(source / "strange.parquet", text=["a"])
    (source / "broken.parquet").write_bytes(b"PAR1")
    parquet_of(source / "some.parquet", id=["p0", "p1"], image=[IMAGES["0000"], None])
    run(source)
    assert set(by_id(tmp_path / "out")) == {"good.png", "p0", "t0000", "t0003", "t0004", "t0005"}
    found = {row["id"] or row["source"]: row["error"] for row in errors(tmp_path / "out")}
    assert set(found) == {"cut.png", "empty.png", "eps.jpg", "strange.parquet", "broken.parquet", "p1", "t0002"}
    assert found["strange.parquet"] == "KeyError: 'bytes'" and "whole picture" in found["p1"]
    for path in source.glob("*"):
        path.unlink()
    (source / "mended.png").write_bytes(IMAGES["0000"])
    run(source)
    assert not errors(tmp_path / "out")


def test_upright_and_sixteen_bits(run, tmp_path):
    ramp = np.linspace(0, 65535, 30 * 40, dtype=np.uint16).reshape(30, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    source = folder_of(tmp_path / "source", {"deep": encoded(Image.fromarray(ramp))})
    folder_of(source, {"flat": encoded(Image.fromarray((ramp / 257).round().astype(np.uint8)))})
    folder_of(source, {"turned": encoded(picture(3), exif=exif)})
    folder_of(source, {"upright": encoded(picture(3).rotate(-90, expand=True))})
    run(source)
    found = by_id(tmp_path / "out")
    np.testing.assert_allclose(found["deep.png"], found["flat.png"], atol=1e-5)
    np.testing.assert_allclose(found["turned.png"], found["upright.png"], atol=1e-6)


def test_other_settings_and_places_are_refused(run, tmp_path, monkeypatch):
    source = folder_of(tmp_path / "source", IMAGES)
    run(source)
    with pytest.raises(ValueError, match="made with another temperature: "):
        run(source, temperature=2.0)
    bank = tmp_path / "bank.txt"
    bank.write_text("dog")
    run(source, "own bank", bank=str(bank))
    bank.write_text("cat")
    with pytest.raises(ValueError, match="made with another bank_sha256: "):
        run(source, "own bank", bank=str(bank))
    with pytest.raises(ValueError, match="made with another source: "):  # whose pictures of the same name would be lost
        run(folder_of(tmp_path / "another", IMAGES))
    with pytest.raises(ValueError, match="made with another weights, precision: "):
        run(source, precision="bf16")
    with pytest.raises(ValueError, match="must lie between"):
        run(source, "third", temperature=0.0)
    assert run(source, "third")["images"] == 6  # what was wrong has left nothing behind
    with pytest.raises(ValueError, match="lies in it"):
        run(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: nothing in it is a picture"):
        run(tmp_path / "empty", "out2")
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    assert run(source, "without ray", local=False)["images"] == 6


def test_a_killed_run_leaves_whole_files_and_the_next_goes_on(tmp_path, clip):
    source = folder_of(tmp_path / "source", {f"{n:04d}": IMAGES["0000"] for n in range(60)})
    code = "import sys; from bsap_utils import embedding as e; e.ROWS = 2; e.embed(*sys.argv[1:4], local=True, bank='generic')"
    process = subprocess.Popen([sys.executable, "-c", code, source, tmp_path / "out", clip], cwd=ROOT, stdout=-3)
    deadline = time.monotonic() + 240
    while len([*tmp_path.glob("out/features/*.parquet")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(read_features(tmp_path / "out")[0])
    assert 0 < done < 60
    assert embed(source, tmp_path / "out", clip, local=True, bank="generic")["images"] == 60 - done
    assert sorted(read_features(tmp_path / "out")[0]) == [f"{n:04d}.png" for n in range(60)]


@pytest.fixture
def ray_here():
    """A Ray of this machine; its own start gives up after 30 seconds, which a busy machine may need."""
    ray = pytest.importorskip("ray")
    for _ in range(3):
        with contextlib.suppress(Exception):
            quiet = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
            ray.init(address="local", num_cpus=1, **quiet)  # each worker imports PyTorch, on as few cores as there are
            break
    yield
    ray.shutdown()


def test_over_ray_the_features_are_the_same(tmp_path, clip, run, ray_here):
    source = folder_of(tmp_path / "source", IMAGES | {"broken": b"x"})
    tar_of(source / "a.tar", {f"t{n}.png": c for n, c in IMAGES.items()})
    assert run(source, "ray", local=False) == {"images": 12, "errors": 1}
    assert run(source, "ray") == {"images": 0, "errors": 1}  # in this process: it goes on with what Ray made
    run(source, "here")
    here, there = by_id(tmp_path / "here"), by_id(tmp_path / "ray")
    assert here.keys() == there.keys() and all(np.allclose(here[key], there[key], atol=2e-6) for key in here)
    assert [row["id"] for row in errors(tmp_path / "ray")] == ["broken.png"]


def test_a_picture_that_comes_back_with_its_old_time_is_made_again(run, tmp_path):
    source = folder_of(tmp_path / "source", IMAGES)
    file = sorted(source.iterdir())[0]
    first, stat = file.read_bytes(), file.stat()
    run(source)
    was = by_id(tmp_path / "out")[file.name]
    file.write_bytes(encoded(picture(77)))
    run(source)
    file.write_bytes(first)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(source)["images"] == 1 and by_id(tmp_path / "out")[file.name] @ was > 0.9999


def test_what_a_kill_left_half_written_and_what_two_runs_wrote_twice_do_not_count(run, tmp_path):
    source, features = folder_of(tmp_path / "source", IMAGES), tmp_path / "out/features"
    features.mkdir(parents=True)
    (features / ".1790-000000.77.part.parquet").write_bytes(os.urandom(2000))
    assert run(source)["images"] == 6
    (whole,) = features.glob("[!.]*.parquet")
    shutil.copy(whole, features / "9-000000.parquet")
    assert len(embedding.read_features(tmp_path / "out")[0]) == 6


def test_hidden_members_of_a_tar_are_left_out(run, tmp_path):
    hidden = dict.fromkeys(["._a.png", "__MACOSX/._a.png", "@eaDir/a.png"], b"of the system")
    tar_of(tmp_path / "source/a.tar", {"a.png": encoded(picture(1))} | hidden)
    assert run(tmp_path / "source") == {"images": 1, "errors": 0}
