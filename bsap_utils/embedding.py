"""Features of millions of images, for a `retrieval.BalancedIndex`: `bsap embed SOURCE OUT`, over Ray or in this process.

SOURCE is a folder (pictures, parquet with image bytes, WebDataset's tars) or one such file; OUT then holds

    features/*.parquet   id, source, stamp (size and mtime of the source), feature (D float32, a unit vector), bias (`pool`)
    errors.parquet       id, source, error: what could not be read
    auxiliary.parquet    text, feature: the bank behind the bias; embedding.json says what made them

An id is the path in SOURCE, a tar member's name without suffix, or a parquet column `id`, `image_id`, `key` or `__key__`,
else file and row. Hidden files and linked folders are left out. Ray's own readers would end at the first broken picture.
"""

import hashlib
import json
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from torchvision.transforms.v2.functional import pil_to_tensor

import bsap_utils

from .aux_prompts import auxiliary_prompts
from .datasets import open_picture, read_json, write_file
from .normalization import pool, shift_and_scale_from_features
from .scoring import TEMPLATE, ClipScorer, ahead
from .visual_prompts import squash

PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
ASIDE = re.compile(r"/(\.|@eaDir/|__MACOSX/)")  # hidden files, thumbnails of network disks, macOS's own
IDS = ["id", "image_id", "key", "__key__"]
ROWS, LARGEST = 256, 200_000_000  # images decoded at a time, 37 MiB of pixels at 224 x 224; bytes of a picture in a tar


def text_of(name: Any) -> str:
    """A name as text that Ray and parquet can hold, also where it is bytes, not in UTF-8, or 581857.0."""
    name = int(name) if isinstance(name, float) and name.is_integer() else name
    return os.fsencode(name if isinstance(name, bytes) else str(name)).decode("utf-8", "backslashreplace")


def files_to_read(source: Path, out: Path) -> list[str]:
    """Path, name in `source`, stamp and ids in `out` of each file that is not done, as JSON: Ray knows only UTF-8."""
    done, files, aside, root = {}, [], Counter[str](), source if source.is_dir() else source.parent
    if any((out / "features").glob("[!.]*.parquet")):  # those that are whole
        done = latest(out, ["id", "source", "stamp"]).groupby(["source", "stamp"])["id"].agg(list).to_dict()
    for path in sorted([source, *source.rglob("*")]):
        name, suffix = path.relative_to(root).as_posix(), path.suffix.lower()
        hidden = ASIDE.search(f"/{name}")
        if hidden or not path.is_file() or suffix not in PICTURES | {".tar", ".parquet"}:
            aside["hidden" if hidden else suffix or "without suffix"] += path.is_symlink() or not path.is_dir()
            continue
        key = text_of(name), f"{path.stat().st_size}-{path.stat().st_mtime_ns}"
        if key not in done or suffix not in PICTURES:
            files.append(json.dumps([str(path), *key, dict.fromkeys(done.get(key, []))]))
    others = ", ".join(f"{count:,} {suffix}" for suffix, count in aside.items() if count) or "nothing"
    print(f"{source}: {len(files):,} files to read, {sum(map(len, done.values())):,} pictures done, "
          f"left aside: {others}", flush=True)  # fmt: skip
    if not files and not done:
        raise ValueError(f"{source}: nothing in it is a picture ({' '.join(sorted(PICTURES))}), .tar or .parquet.")
    return files


def pictures_of(path: Path, source: str) -> Iterator[tuple[str, Any]]:
    """Id and content of each picture of a file: its path, its bytes, or at last the error that broke the file off."""
    try:
        if path.suffix.lower() == ".tar":
            with tarfile.open(path, ignore_zeros=True) as archive:  # goes on behind a broken header
                for member in filter(tarfile.TarInfo.isfile, archive):
                    if Path(member.name).suffix.lower() in PICTURES and not ASIDE.search(f"/{member.name}"):
                        content: Any = archive.extractfile(member).read(LARGEST)  # type: ignore[union-attr]
                        yield text_of(member.name.rpartition(".")[0]), content
        elif path.suffix.lower() == ".parquet":
            batches = pq.ParquetFile(path).iter_batches(ROWS, columns=["image", "bytes", *IDS])
            for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                content = row["image"] if "image" in row else row["bytes"]
                name = next((row[key] for key in IDS if row.get(key) is not None), f"{path.stem}-{number:09d}")
                yield text_of(name), content["bytes"] if isinstance(content, dict) else content  # Hugging Face's struct
        else:
            yield source, path
    except Exception as error:  # damaged tars and parquet raise nearly anything
        yield "", error


def read(files: dict[str, Any], size: Any, interpolation: str) -> Iterator[dict[str, np.ndarray]]:
    """Read of {"item": files} what is not done, ROWS rows at a time: id, source, stamp, error, pixels (black at an error)."""

    def decode(row: tuple) -> dict[str, Any]:
        error, content, pixels = "", row[3], np.zeros((3, *np.broadcast_to(size, 2)), np.uint8)
        try:
            if isinstance(content, Exception):
                raise content
            pixels = squash(pil_to_tensor(open_picture(content, upright=True)), size, interpolation).numpy()
        except Exception as problem:  # of the file or of a decoder
            error = text_of(f"{type(problem).__name__}: {problem}")
        return {"id": row[0], "source": row[1], "stamp": row[2], "error": error, "pixels": pixels}

    rows = (
        (name, source, stamp, content)
        for path, source, stamp, done in map(json.loads, files["item"])
        for name, content in pictures_of(Path(path), source)
        if name not in done
    )
    for part in ahead(decode, iter(lambda: [*islice(rows, ROWS)], [])):
        yield {name: np.stack([row[name] for row in part]) for name in part[0]}


class Encoder:
    """Replaces the pixels of a batch by feature and bias, in this process or as an actor of Ray."""

    def __init__(self, texts: list[str], temperature: float, *model: Any) -> None:
        self.scorer, self.temperature = ClipScorer(*model, cache=False), temperature  # type: ignore[misc]
        self.aux, _ = self.scorer.encode_texts(texts), pool(torch.zeros(1, 1), temperature)  # ValueError if it is none

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        scale, features = self.scorer.logit_scale, self.scorer.encode_images(torch.tensor(batch.pop("pixels")))
        bias, _ = shift_and_scale_from_features(features, self.aux, scale, temperature=self.temperature)
        return batch | {"feature": features.numpy(), "bias": bias.float().numpy()}


def over_ray(files: list[str], decoding: tuple, encoder: tuple, address: str) -> Iterator[dict[str, np.ndarray]]:
    """Read in tasks on the CPUs, encode in a pool of actors, one a GPU, else one for two CPUs: each picture once, any order."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
    import ray

    if not ray.is_initialized():  # a cluster's nodes need what is in pyproject.toml; this package is sent to them
        sent = {"py_modules": [bsap_utils]} if address else None
        ray.init(address or "local", runtime_env=sent, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    actors: dict = {"concurrency": min(gpus or max(cpus // 2, 1), len(files)), "num_gpus": min(gpus, 1), "num_cpus": 0}
    # batches of a size would be waited for, so that few files were read by one task
    pixels = ray.data.from_items(files).map_batches(read, fn_args=decoding, batch_size=None)  # type: ignore[arg-type]
    done = pixels.map_batches(Encoder, fn_constructor_args=encoder, batch_size=None, **actors)
    yield from done.iter_batches(batch_size=None, batch_format="numpy")


def write(out: Path, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, int]:
    """Write each batch as a file of its own, whole or not at all; and errors.parquet at the end."""
    errors, count, start = pd.DataFrame(columns=["id", "source", "error"]), 0, time.time_ns()
    for number, batch in enumerate(batches):
        frame = pd.DataFrame(batch | {"feature": list(batch["feature"])})
        good = frame[frame["error"] == ""].drop(columns="error").reset_index(drop=True)
        if len(good):
            write_file(out / f"features/{start}-{number:06d}.parquet", good.to_parquet)
        errors = pd.concat([errors, frame.loc[frame["error"] != "", list(errors)]], ignore_index=True)
        count += len(good)
        print(f"  {count:,} pictures, {len(errors):,} that cannot be read (errors.parquet)", flush=True)
    write_file(out / "errors.parquet", errors.to_parquet)
    return {"images": count, "errors": len(errors)}


def embed(source: Path, out: Path, model: str = "ViT-B-32", pretrained: str = "openai", bank: str = "coco80",
          temperature: float = 1.0, precision: str = "fp32", local: bool = False, address: str = "") -> dict:  # fmt: skip
    """Write features and biases of the pictures of `source` that `out` has not with the same stamp; return what was made.

    With Ray it runs over the cluster at `address` (whose nodes see `source` and model under the same path), else over this
    machine; without Ray, or `local`, in this process. Raises ValueError, ModelError.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    if not source.exists() or out.is_relative_to(source):
        raise ValueError(f"{source}: no such file or folder, or {out} lies in it, which the next run would read.")
    with_ray = address or (find_spec("ray") and not local)
    texts = [TEMPLATE.format(text.lower()) for text in auxiliary_prompts(bank)]
    how = texts, temperature, model, pretrained
    encoder = Encoder(*how, "cpu" if with_ray else "auto", precision)
    scorer, digest = encoder.scorer, hashlib.sha256("\n".join(texts).encode()).hexdigest()
    made: dict[str, Any] = {"source": text_of(source), "model": model, "pretrained": scorer.pretrained}
    made |= {"weights": scorer.weights_hash, "precision": precision, "logit_scale": scorer.logit_scale}
    made |= {"bank": bank, "bank_sha256": digest, "temperature": temperature}
    before = read_json(out / "embedding.json") if (out / "embedding.json").exists() else made
    if differ := [key for key in made if before.get(key) != made[key]]:
        raise ValueError(f"{out} was made with another {', '.join(differ)}: pass the same, or another folder.")
    files, decoding = files_to_read(source, out), (scorer.image_size, scorer.interpolation)
    write_file(out / "embedding.json", json.dumps(made | {"version": bsap_utils.__version__}, indent=1).encode())
    write_file(out / "auxiliary.parquet", pd.DataFrame({"text": texts, "feature": [*encoder.aux.numpy()]}).to_parquet)
    over = over_ray(files, decoding, (*how, "auto", precision), address) if with_ray and files else None
    return write(out, over or map(encoder, read({"item": files}, *decoding)))


def latest(out: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Return the rows of `out`'s features, all `columns` or some; of a source that was replaced, those of its last stamp."""
    frame = pd.read_parquet(out / "features", columns=columns)
    return frame[frame["stamp"] == frame.groupby("source")["stamp"].transform("last")]


def read_features(out: Path | str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Read what `embed` wrote: N ids, features [N, D] and biases [N]; of a source that was replaced, the last."""
    frame = latest(Path(out)).drop_duplicates(["source", "stamp", "id"], keep="last")
    return frame["id"].tolist(), torch.tensor(np.stack(frame["feature"])), torch.tensor(frame["bias"].to_numpy())
