"""Embedding at scale: real images, parquet and tars, a process that is killed, and a local Ray one of whose actors dies."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from bsap_utils import ROOT, cli, embedding
from bsap_utils.aux_prompts import auxiliary_prompts
from bsap_utils.embedding import EmbeddingError, decode, embed, plan, read, read_features
from bsap_utils.scoring import ClipScorer


def picture(number: int, size=(40, 30)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


IMAGES = {f"{number:04d}": encoded(picture(number)) for number in range(10)}


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


def parquet_of(path: Path, row_group_size: int = 4, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.fixture(scope="module")
def clip(save_clip) -> str:
    return f"local-dir:{save_clip()}"


@pytest.fixture
def run(tmp_path, clip):
    def embed_here(source, out="out", **options):
        return embed(source, tmp_path / out, clip, local=True, num_gpus=0, **options)

    return embed_here


def by_id(out: Path) -> dict[str, np.ndarray]:
    ids, features, _ = read_features(out)
    return dict(zip(ids, features.numpy(), strict=True))


def test_features_and_bias_are_those_of_the_scorer(run, tmp_path, clip):
    counts = run(folder_of(tmp_path / "source", IMAGES), shard_size=4, temperature=2.0, bank="generic")
    ids, features, bias = read_features(tmp_path / "out")
    assert counts == {"images": 10, "errors": 0, "duplicates": 0}
    assert ids == [f"{name}.png" for name in IMAGES] and features.dtype == bias.dtype == torch.float32
    scorer = ClipScorer(clip, device="cpu")
    expected = scorer.encode_images([picture(number) for number in range(10)])
    torch.testing.assert_close(features, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(10))
    texts = [f"a photo of {text.lower()}" for text in auxiliary_prompts("generic")]
    logits = (scorer.logit_scale * expected @ scorer.encode_texts(texts).T).double().numpy()
    np.testing.assert_allclose(bias, 2 * np.log(np.exp(logits / 2).sum(1)), rtol=1e-5)
    auxiliary = pq.read_table(tmp_path / "out" / "auxiliary.parquet")
    assert auxiliary["text"].to_pylist() == texts
    np.testing.assert_allclose(np.stack(auxiliary["feature"].to_numpy()), scorer.encode_texts(texts), atol=1e-6)
    made = json.loads((tmp_path / "out" / "embedding.json").read_text())
    facts = {
        "weights": scorer.weights_hash(),
        "precision": "fp32",
        "dimensions": 16,
        "temperature": 2.0,
        "bank": "generic",
    }
    assert facts.items() <= made.items() and made["logit_scale"] == pytest.approx(scorer.logit_scale)
    assert made["versions"]["torch"] == torch.__version__


def test_the_same_images_in_every_layout(run, tmp_path):
    names, contents = list(IMAGES), list(IMAGES.values())
    run(folder_of(tmp_path / "folder", {f"a/b {name}": content for name, content in IMAGES.items()}), "of folder")
    sources = {
        "tars": tar_of(tmp_path / "tars/0.tar", {f"{n}.png": c for n, c in IMAGES.items()} | {"0001.json": b"{}"}),
        "bytes": parquet_of(tmp_path / "bytes.parquet", id=names, bytes=contents, caption=names),
        "struct": parquet_of(
            tmp_path / "hf.parquet", image=[{"bytes": c, "path": "x.png"} for c in contents], key=names
        ),
        "numbered": parquet_of(tmp_path / "numbered.parquet", image=contents),
    }
    expected = by_id(tmp_path / "of folder")
    assert list(expected) == [f"a/b {name}.png" for name in names]
    for name, source in sources.items():
        assert run(source.parent if name == "tars" else source, f"of {name}", shard_size=4)["images"] == 10
        found = by_id(tmp_path / f"of {name}")
        assert list(found) == (names if name != "numbered" else [f"numbered-{row:09d}" for row in range(10)])
        np.testing.assert_allclose(np.stack([*found.values()]), np.stack([*expected.values()]), atol=2e-6)


@pytest.mark.parametrize("mode, kind", [("RGB", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"),
                                        ("RGB", "WEBP"), ("RGB", "GIF"), ("RGB", "BMP"), ("1", "TIFF")])  # fmt: skip
def test_decoding_agrees_with_pil(mode, kind):
    content = encoded(picture(3, (24, 24)).convert(mode), kind)
    pixels, error = decode(content, 24)
    assert not error and pixels.dtype == torch.uint8
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
    assert np.abs(pixels.numpy().astype(int) - expected).mean() < 1


def test_sixteen_bits_and_animations():
    ramp = np.linspace(0, 65535, 24 * 24, dtype=np.uint16).reshape(24, 24)
    pixels, error = decode(encoded(Image.fromarray(ramp)), 24)
    assert not error and np.abs(pixels[0].numpy() - ramp / 257).max() <= 1
    first, second = picture(1, (24, 24)), picture(2, (24, 24))
    content = encoded(first, "GIF", save_all=True, append_images=[second])
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_allclose(decode(content, 24)[0].numpy(), expected, atol=1)


def test_a_broken_image_is_a_row_and_not_a_dead_job(run, tmp_path, capsys):
    jpeg = encoded(picture(1, (200, 200)), "JPEG")
    broken = {"empty": b"", "text": b"no image", "truncated": jpeg[: len(jpeg) // 2], "header": jpeg[:20]}
    source = folder_of(tmp_path / "source", IMAGES | broken)
    (source / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (source / "notes.md").write_text("not an image")
    counts = run(source, shard_size=3)
    errors = pd.read_parquet(tmp_path / "out/errors.parquet").set_index("id")
    assert counts == {"images": 10, "errors": 5, "duplicates": 0}
    assert (
        set(errors.index) == {f"{name}.png" for name in [*broken, "gone"]}
        and errors.loc["empty.png", "error"] == "no bytes"
    )
    assert "truncated" in errors.loc["truncated.png", "error"] and not set(errors.index) & set(by_id(tmp_path / "out"))
    assert set(errors["shard"]) <= {path.stem for path in (tmp_path / "out/features").iterdir()}
    printed = capsys.readouterr().out
    assert "5 could not be read" in printed and "1 other files were left aside" in printed
    run(folder_of(tmp_path / "whole", IMAGES), "out of whole")
    expected, found = by_id(tmp_path / "out of whole"), by_id(tmp_path / "out")
    assert list(found) == list(expected)
    np.testing.assert_allclose(np.stack([*found.values()]), np.stack([*expected.values()]), atol=2e-6)


def test_a_file_that_vanishes_after_the_plan_and_bytes_that_are_null(tmp_path):
    folder = folder_of(tmp_path / "source", IMAGES)
    shards = plan(folder)[0]
    (folder / "0004.png").unlink()
    [batch] = read(shards, 32)
    assert [bool(error) for error in batch["error"]] == [number == 4 for number in range(10)]
    assert batch["error"][4].startswith("FileNotFoundError") and not batch["pixels"][4].any()
    parquet = parquet_of(tmp_path / "x.parquet", image=[{"bytes": IMAGES["0000"]}, {"bytes": None}, None])
    [batch] = read(plan(parquet)[0], 32)
    assert list(batch["error"]) == ["", "no bytes", "no bytes"]


def test_damaged_and_empty_tars_are_told(run, tmp_path, capsys):
    source = tmp_path / "tars"
    tar = tar_of(source / "cut.tar", {f"{name}.png": content for name, content in IMAGES.items()})
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2 // 512 * 512 + 512])
    tar_of(source / "empty.tar", {"0.txt": b"hello"})
    (source / "nonsense.tar").write_bytes(b"nonsense" * 200)
    counts = run(source)
    errors = pd.read_parquet(tmp_path / "out/errors.parquet")
    assert 0 < counts["images"] < 10 and counts["errors"] == 3
    assert (
        f"cannot be read on after {counts['images']} images" in errors["error"][0]
        and errors["error"][1] == "no image in it"
    )
    assert run(source) == counts and "3 shards are there already, 0 to do" in capsys.readouterr().out


def test_ids_that_come_twice_are_told_and_kept(run, tmp_path, capsys):
    for name in "ab":
        tar_of(tmp_path / f"tars/{name}.tar", {"0001.png": IMAGES["0001"], f"{name}.png": IMAGES["0002"]})
    assert run(tmp_path / "tars") == {"images": 4, "errors": 0, "duplicates": 1}
    assert "1 ids are not the first of their name" in capsys.readouterr().out


@pytest.mark.parametrize("make, message", [
    (lambda root: root / "nowhere", "nowhere: no such file"),
    (lambda root: folder_of(root / "none", {}) if (root / "none").mkdir() else root / "none", "has no images"),
    (lambda root: parquet_of(root / "rows.parquet", image=pa.array([], pa.binary())), "no row"),
    (lambda root: parquet_of(root / "urls.parquet", image=["http://x"], url=["y"]), "no column image or bytes of bytes"),
    (lambda root: (root / "cut.parquet").write_bytes(b"PAR1") and root / "cut.parquet", "cut.parquet is damaged"),
])  # fmt: skip
def test_sources_that_cannot_be_used_say_why(run, tmp_path, make, message):
    with pytest.raises(EmbeddingError, match=message):
        run(make(tmp_path))
    assert not (tmp_path / "out").exists()


def test_out_must_not_lie_in_the_source(run, tmp_path):
    with pytest.raises(EmbeddingError, match="lies in"):
        run(folder_of(tmp_path, IMAGES), "out")


def test_other_settings_are_refused_and_not_mixed(run, tmp_path, save_clip, clip):
    source, out = folder_of(tmp_path / "source", IMAGES), tmp_path / "out"
    run(source, shard_size=4)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*.*"))}
    with pytest.raises(EmbeddingError, match=r"other settings: temperature was 1\.0, is 5\.0"):
        run(source, shard_size=4, temperature=5.0)
    with pytest.raises(EmbeddingError, match="bank was 'coco80', is 'generic'"):
        run(source, shard_size=4, bank="generic")
    weights = Path(clip.removeprefix("local-dir:"), "open_clip_model.safetensors")
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"\0\0\0\1")
    try:
        with pytest.raises(EmbeddingError, match="weights was"):
            run(source, shard_size=4)
    finally:
        weights.write_bytes(kept)
    with pytest.raises(EmbeddingError, match="shard size, has changed"):
        run(source, shard_size=5)
    (source / "0005.png").unlink()
    with pytest.raises(EmbeddingError, match="are of no shard"):
        run(source, shard_size=4)
    (out / "embedding.json").write_text("{")
    with pytest.raises(EmbeddingError, match="embedding.json is damaged"):
        run(source, shard_size=4)
    (out / "embedding.json").write_bytes(before[out / "embedding.json"])
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.*"))} == before
    with pytest.raises(ValueError, match="temperature"):
        run(source, "other", temperature=0.0)


def test_a_new_tar_is_added_and_a_changed_one_refused(run, tmp_path, capsys):
    tar_of(tmp_path / "tars/0.tar", {"a.png": IMAGES["0001"]})
    run(tmp_path / "tars")
    tar_of(tmp_path / "tars/1.tar", {"b.png": IMAGES["0002"]})
    assert run(tmp_path / "tars")["images"] == 2 and "1 shards are there already, 1 to do" in capsys.readouterr().out
    tar_of(tmp_path / "tars/0.tar", {"a.png": IMAGES["0001"], "c.png": IMAGES["0003"] * 9})
    with pytest.raises(EmbeddingError, match="are of no shard"):
        run(tmp_path / "tars")


@given(rows=st.lists(st.integers(0, 7), min_size=1, max_size=12), size=st.integers(1, 9))
def test_row_groups_are_packed_each_once(tmp_path_factory, rows, size):
    path = tmp_path_factory.mktemp("plan") / "x.parquet"
    schema = pa.schema({"id": pa.int64(), "image": pa.binary()})
    with pq.ParquetWriter(path, schema) as writer:
        for group, count in enumerate(rows):
            ids = [100 * group + row for row in range(count)]
            writer.write_table(pa.table({"id": ids, "image": [b"x"] * count}, schema), row_group_size=100)
    if not sum(rows):
        with pytest.raises(EmbeddingError):
            plan(path, size)
        return
    shards, _ = plan(path, size)
    assert shards == plan(path, size)[0] and len({shard["name"] for shard in shards}) == len(shards)
    ids = [name for shard in shards for name, _ in embedding._images(shard)]
    assert ids == [str(100 * group + row) for group, count in enumerate(rows) for row in range(count)]
    assert all(sum(shard["rows"][:-1]) < size for shard in shards)


def test_kinds_of_a_folder(tmp_path):
    folder = folder_of(tmp_path, IMAGES)
    assert plan(folder, 3)[1] == 0 and [len(shard["files"]) for shard in plan(folder, 3)[0]] == [3, 3, 3, 1]
    parquet_of(tmp_path / "meta.parquet", bytes=[b"x"])
    assert plan(folder)[1] == 10 and [Path(shard["path"]).name for shard in plan(folder)[0]] == ["meta.parquet"]
    tar_of(tmp_path / "z.tar", {})
    assert plan(folder)[1] == 11 and [Path(shard["path"]).name for shard in plan(folder)[0]] == ["z.tar"]


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_shards_come_together_from_batches_in_any_order(counts, data):
    last = {(shard, count - 1): count for shard, count in enumerate(counts)}
    rows = data.draw(st.permutations([(shard, place) for shard, n in enumerate(counts) for place in range(n)]))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows)))) | {len(rows)})
    batches = []
    for part in (rows[start:stop] for start, stop in zip([0, *cuts], cuts, strict=False)):
        shard, place = np.array(part).T
        total = np.array([last.get(row, 0) for row in part])
        batches.append({"shard": shard, "place": place, "total": total, "feature": np.stack([shard, place], 1)})
    found = dict(embedding._whole_shards(batches))
    assert {name: list(rows["place"]) for name, rows in found.items()} == {i: [*range(n)] for i, n in enumerate(counts)}
    for name, rows in found.items():
        assert [tuple(feature) for feature in rows["feature"]] == [(name, place) for place in rows["place"]]


def test_shards_are_read_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "ROWS", 4)
    shards = plan(folder_of(tmp_path / "source", IMAGES), 6)[0]
    batches = list(read(shards, 32, threads=3))
    assert [len(batch["id"]) for batch in batches] == [4, 2, 4]
    assert np.concatenate([batch["place"] for batch in batches]).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert np.concatenate([batch["total"] for batch in batches]).tolist() == [0, 0, 0, 0, 0, 6, 0, 0, 0, 4]
    assert [name for batch in batches for name in batch["id"]] == [f"{name}.png" for name in IMAGES]
    assert all(batch["pixels"].shape[1:] == (3, 32, 32) for batch in batches)


def test_a_shard_that_could_not_be_written_is_not_there(run, tmp_path, monkeypatch):
    def full_disk(table, path, write=pq.write_table):
        write(table, path)
        if "-000000006-" in path.name:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError("No space left on device")

    source = folder_of(tmp_path / "source", IMAGES)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(pq, "write_table", full_disk)
        run(source, shard_size=6)
    assert len(read_features(tmp_path / "out")[0]) == 6
    assert run(source, shard_size=6)["images"] == 10


def test_an_encoder_with_other_weights_refuses(clip):
    with pytest.raises(EmbeddingError, match="other weights"):
        embedding.Encoder({"model": clip, "device": "cpu"}, "0" * 12)


def test_a_killed_process_goes_on_where_it_was(run, tmp_path, clip, capsys):
    """SIGKILL, which nothing can catch, after the third shard of 40; then the same again."""
    source = folder_of(
        tmp_path / "source", {f"{number:04d}": IMAGES["0001"] for number in range(158)} | {"bad": b"", "bad2": b""}
    )
    command = [
        "embed",
        str(source),
        str(tmp_path / "out"),
        "--model",
        clip,
        "--local",
        "--num-gpus",
        "0",
        "--shard-size",
        "4",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "bsap_utils.cli", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[3/40]"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").glob("*.parquet")}
    assert 3 <= len(there) < 40
    (tmp_path / "out/features/.images-000000000-0.parquet.part").write_bytes(b"half")  # what a kill may leave
    counts = run(source, shard_size=4)
    printed = capsys.readouterr().out
    assert f"{len(there)} shards are there already, {40 - len(there)} to do" in printed
    assert counts == {"images": 158, "errors": 2, "duplicates": 0}
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert len(re.findall(r"^\[\d+/", printed, re.M)) == 40 - len(there)
    run(source, "clean", shard_size=4)
    (ids, features, bias), clean = read_features(tmp_path / "out"), read_features(tmp_path / "clean")
    assert ids == clean[0]
    torch.testing.assert_close(features, clean[1])
    torch.testing.assert_close(bias, clean[2])


def test_errors_of_a_shard_that_was_not_completed_are_not_told_twice(run, tmp_path):
    source = folder_of(tmp_path / "source", IMAGES | {"bad": b""})
    run(source, shard_size=6)
    shard = pd.read_parquet(tmp_path / "out/errors.parquet")["shard"][0]
    (tmp_path / f"out/features/{shard}.parquet").unlink()
    assert run(source, shard_size=6) == {"images": 10, "errors": 1, "duplicates": 0}


def test_a_cluster_that_cannot_be_joined_is_told(tmp_path, clip, monkeypatch):
    ray = pytest.importorskip("ray")

    def no_answer(**options):
        assert options["address"] == "10.0.0.1:6379" and "runtime_env" in options
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379.")

    monkeypatch.setattr(ray, "init", no_answer)
    source = folder_of(tmp_path / "source", IMAGES)
    arguments = ["embed", str(source), str(tmp_path / "out"), "--model", clip, "--address", "10.0.0.1:6379"]
    told = CliRunner().invoke(cli.app, arguments)
    assert told.exit_code == 1 and "cannot be joined: Failed to connect" in told.output and "--local" in told.output


def test_the_command(tmp_path, clip):
    source = folder_of(tmp_path / "source", IMAGES)
    arguments = ["embed", str(source), str(tmp_path / "out"), "--model", clip, "--local", "--num-gpus", "0"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0 and "10 images are in" in done.output
    refused = CliRunner().invoke(cli.app, [*arguments, "--temperature", "2"])
    assert refused.exit_code == 1 and "other settings: temperature" in refused.output
    unknown = CliRunner().invoke(cli.app, [*arguments[:2], str(tmp_path / "b"), "--model", "ViT-B-23", "--local"])
    assert unknown.exit_code == 1 and "ViT-B-32" in unknown.output


def start_ray(ray, attempts=3):
    """Start a Ray of four CPUs; its own limit for that, 30 s, is short on a busy machine."""
    try:
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception:
        ray.shutdown()
        if attempts == 1:
            raise
        start_ray(ray, attempts - 1)


@pytest.fixture(scope="module")
def over_ray(tmp_path_factory, clip):
    """A job over a Ray of four CPUs that a local one began, and in which an actor is killed at its second batch."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    root = tmp_path_factory.mktemp("ray")
    marker = root / "killed"
    source = folder_of(
        root / "source", {f"{number:04d}": encoded(picture(number)) for number in range(80)} | {"bad": b"x"}
    )
    options = {"model": clip, "shard_size": 8, "num_gpus": 0}
    embed(source, root / "local", **options, local=True)
    (root / "ray/features").mkdir(parents=True)
    shutil.copy2(root / "local/embedding.json", root / "ray")
    for path in sorted((root / "local/features").iterdir())[2:4]:
        shutil.copy2(path, root / "ray/features")

    class Mortal(embedding.Encoder):
        calls = 0

        def __call__(self, batch):
            self.calls += 1
            if self.calls == 2 and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr(embedding, "Encoder", Mortal)
        patch.setattr(embedding, "say", lines.append)
        start_ray(ray)
        try:
            counts = embed(source, root / "ray", **options)
        finally:
            ray.shutdown()
    return root, marker, lines, counts


def test_ray_writes_what_the_local_mode_writes(over_ray):
    root, _, lines, counts = over_ray
    names = sorted(path.name for path in (root / "local/features").iterdir())
    assert counts == {"images": 80, "errors": 1, "duplicates": 0}
    assert sorted(path.name for path in (root / "ray/features").iterdir()) == names and len(names) == 11
    for name in names:
        here, there = (pq.read_table(root / mode / "features" / name) for mode in ("local", "ray"))
        assert here.schema == there.schema and here["id"].equals(there["id"])
    for here, there in zip(read_features(root / "local")[1:], read_features(root / "ray")[1:], strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    here, there = (pd.read_parquet(root / mode / "errors.parquet") for mode in ("local", "ray"))
    pd.testing.assert_frame_equal(here, there)
    assert "over Ray: 4 CPUs, 0 GPUs" in "\n".join(lines)


def test_a_killed_actor_loses_nothing(over_ray):
    root, marker, lines, _ = over_ray
    killed = marker.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int(killed), 0)
    workers = {
        worker.rpartition(":")[2]
        for line in lines
        if line.startswith("[")
        for worker in line.split(" by ")[1].split(", ")
    }
    assert killed in workers and len(workers) >= 2  # it had done a shard; others went on
    assert read_features(root / "ray")[0] == read_features(root / "local")[0]


def test_ray_goes_on_where_the_local_mode_was(over_ray):
    root, _, lines, _ = over_ray
    assert any(line.startswith("2 shards are there already, 9 to do") for line in lines)
    for path in sorted((root / "local/features").iterdir())[2:4]:
        assert (root / "ray/features" / path.name).stat().st_mtime_ns == path.stat().st_mtime_ns
