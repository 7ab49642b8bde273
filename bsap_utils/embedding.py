"""Features of millions of images, for a `retrieval.BalancedIndex`: `bsap embed SOURCE OUT`, over Ray or in this process.

SOURCE is a folder (pictures, parquet with image bytes, WebDataset's tars) or one such file; OUT then holds

    features/*.parquet   id, source, stamp (size and mtime of the source), feature (D float32, a unit vector), bias (`pool`)
    errors.parquet       id, source, error: what could not be read
    auxiliary.parquet    text, feature: the bank behind the bias; embedding.json says what made them

An id is the path in SOURCE, a tar member's name without suffix, or a parquet column `id`, `image_id`, `key` or `__key__`,
else file and row. Ray's own readers would end at the first broken picture or member, and know only names in UTF-8.
"""

import importlib.util
import json
import os
import tarfile
import time
from collections.abc import Iterator
from functools import partial
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
from .normalization import shift_and_scale_from_features
from .scoring import TEMPLATE, ClipScorer, ahead
from .visual_prompts import squash

PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
IDS = ["id", "image_id", "key", "__key__"]
ROWS, LARGEST = 256, 200_000_000  # images decoded at a time, 37 MiB of pixels at 224 x 224; bytes of a picture in a tar


def text_of(name: Any, otherwise: str) -> str:
    """An id as text: 581857.0 is "581857", b"a" is "a"; `otherwise` where there is none, or one of over 1,000 letters."""
    name = int(name) if isinstance(name, float) and name.is_integer() else name
    text = os.fsencode(name if isinstance(name, bytes) else str(name)).decode("utf-8", "backslashreplace")
    return otherwise if pd.isna(name) or not 0 < len(text) <= 1000 else text


def walk(folder: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Path | None]:
    """The files of a folder in the order of their names, linked folders followed (loops once); None for what is left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in ("__macosx", "@eadir", "thumbnails"):
            yield None
        elif path.is_dir():
            here = path.resolve()
            yield from [None] if here in seen else walk(path, seen | {here})
        else:
            yield path if path.suffix.lower() in PICTURES | {".tar", ".parquet"} and path.is_file() else None


def files_to_read(source: Path, out: Path) -> list[str]:
    """Path, name in `source`, stamp and ids in `out` of each file that is not done, as JSON: Ray knows only UTF-8."""
    done, files = {}, []
    if any((out / "features").glob("*.parquet")):
        table = pd.read_parquet(out / "features", columns=["id", "source", "stamp"])
        done = table.groupby(["source", "stamp"])["id"].agg(list).to_dict()
    found: list[Path | None] = [source] if source.is_file() else [*walk(source, frozenset({source}))]
    root = source.parent if source.is_file() else source
    for path in filter(None, found):
        name, about = path.relative_to(root).as_posix(), path.stat()
        key = text_of(name, name[-1000:]), f"{about.st_size}-{about.st_mtime_ns}"
        if key not in done or path.suffix.lower() not in PICTURES:
            files.append(json.dumps([str(path), *key, done.get(key, [])]))
    print(f"{source}: {len(files):,} files to read, {sum(map(len, done.values())):,} pictures done; "
          f"{found.count(None):,} others left aside", flush=True)  # fmt: skip
    return files


def pictures_of(path: Path) -> Iterator[tuple[Any, Any]]:
    """Id (None: none) and content of the pictures of a file: its path, bytes, or the error of one member of a tar."""
    if path.suffix.lower() == ".tar":
        with tarfile.open(path, ignore_zeros=True) as archive:
            for member in archive:
                if member.isfile() and Path(member.name).suffix.lower() in PICTURES:
                    try:
                        content: Any = archive.extractfile(member).read(LARGEST)  # type: ignore[union-attr]
                    except (tarfile.TarError, OSError) as error:
                        content = error
                    yield member.name.rpartition(".")[0], content
    elif path.suffix.lower() == ".parquet":
        file = pq.ParquetFile(path)
        if not {"image", "bytes"} & {*file.schema_arrow.names}:
            raise ValueError("it has no column image or bytes")
        for batch in file.iter_batches(ROWS, columns=["image", "bytes", *IDS]):
            for row in batch.to_pylist():
                content = row["image"] if "image" in row else row["bytes"]
                content = content["bytes"] if isinstance(content, dict) else content  # Hugging Face's struct
                yield next((row[key] for key in IDS if key in row), None), content
    else:
        yield None, path


def rows_of(files: list[str]) -> Iterator[tuple]:
    """Id, source, stamp and content of all pictures of `files` that are not done; what breaks off ends in an error."""
    for path, source, stamp, ids in map(json.loads, files):
        done = set(ids)
        try:
            for number, (name, content) in enumerate(pictures_of(Path(path))):
                key = source if isinstance(content, Path) else text_of(name, f"{Path(source).stem}-{number:09d}")
                if key not in done:
                    yield key, source, stamp, content
        except Exception as error:  # damaged tars and parquet raise nearly anything
            yield "", source, stamp, error


def decode(row: tuple, size: Any, interpolation: str) -> dict[str, Any]:
    """Id, source, stamp, error and pixels of a row: upright, squashed to the model's square, uint8 [3, S, S]; else black."""
    about, pixels = dict(zip(("id", "source", "stamp", "error"), (*row[:3], ""), strict=True)), row[3]
    try:
        if isinstance(pixels, Exception) or not pixels:
            raise pixels or ValueError("no bytes")
        return about | {"pixels": squash(pil_to_tensor(open_picture(pixels, upright=True)), size, interpolation)}
    except Exception as error:  # of the reader or of a decoder
        black = np.zeros((3, *np.broadcast_to(size, 2)), np.uint8)
        return about | {"error": text_of(str(error), type(error).__name__), "pixels": black}


def read(files: list[str], size: Any, interpolation: str) -> Iterator[dict[str, np.ndarray]]:
    """Read and decode the pictures of `files` that are not done, ROWS at a time."""
    rows = rows_of(files)
    for part in ahead(partial(decode, size=size, interpolation=interpolation), iter(lambda: [*islice(rows, ROWS)], [])):
        yield {name: np.stack([row[name] for row in part]) for name in part[0]}


class Encoder:
    """A scorer that replaces the pixels of a batch by feature and bias, in this process or as an actor of Ray."""

    def __init__(self, how: dict[str, Any], aux: torch.Tensor, temperature: float, weights: str) -> None:
        self.scorer, self.aux, self.temperature = ClipScorer(**how, cache=False), aux, temperature
        if self.scorer.weights_hash() != weights:
            raise ValueError(f"{how['model']} has other weights on this node than where the job began.")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        scale, features = self.scorer.logit_scale, self.scorer.encode_images(torch.tensor(batch.pop("pixels")))
        bias, _ = shift_and_scale_from_features(features, self.aux, scale, temperature=self.temperature)
        return batch | {"feature": features.numpy(), "bias": bias.float().numpy()}


def over_ray(files: list[str], decoding: tuple, encoder: tuple, address: str) -> Iterator[dict[str, np.ndarray]]:
    """Read in tasks and encode in a pool of actors, one a GPU, else one for two CPUs: each picture once, in any order."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
    import ray

    if not ray.is_initialized():  # a cluster's nodes need what is in pyproject.toml; this package is sent to them
        sent: dict[str, Any] = (
            {"runtime_env": {"py_modules": [bsap_utils]}} if address else {"include_dashboard": False}
        )
        ray.init(address=address or "local", log_to_driver=False, **sent)
    ray.data.DataContext.get_current().enable_progress_bars = False
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    actors = ray.data.ActorPoolStrategy(size=min(gpus or max(cpus // 2, 1), len(files)))
    made = encoder[0] | {"device": "cuda" if gpus else "cpu"}, *encoder[1:]
    work = ray.data.from_items([{"file": file} for file in files], override_num_blocks=min(len(files), 16 * cpus))
    pixels = work.map_batches(lambda batch: read(batch["file"].tolist(), *decoding), batch_size=ROWS)
    claims: dict[str, Any] = {"num_gpus": min(gpus, 1), "num_cpus": 0}  # CPUs are for the tasks that read
    done = pixels.map_batches(Encoder, fn_constructor_args=made, batch_size=None, compute=actors, **claims)
    yield from done.iter_batches(batch_size=None, batch_format="numpy")


def embed(source: Path, out: Path, model: str = "ViT-B-32", pretrained: str = "openai", bank: str = "coco80",
          temperature: float = 1.0, local: bool = False, address: str = "") -> dict[str, int]:  # fmt: skip
    """Write features and biases of the pictures of `source` that `out` has not with the same stamp; return what was made.

    With Ray it runs over the cluster at `address` (whose nodes see `source` and model under the same path), else over this
    machine; without Ray, or `local`, in this process. Raises ValueError, ModelError.
    """
    source, out, ray_here = Path(source).resolve(), Path(out).resolve(), importlib.util.find_spec("ray") is not None
    if not source.exists() or out.is_relative_to(source):
        raise ValueError(f"{source}: no such file or folder, or {out} lies in it, which the next run would read.")
    if address and not ray_here:
        raise ValueError("A cluster needs Ray: pip install 'bsap-utils[scale]'. Without --address it runs here.")
    how: dict[str, Any] = {"model": model, "pretrained": pretrained}
    in_process = local or not ray_here
    scorer = ClipScorer(**how, device="auto" if in_process else "cpu", cache=False)
    texts = [TEMPLATE.format(text.lower()) for text in auxiliary_prompts(bank)]
    aux, weights = scorer.encode_texts(texts), scorer.weights_hash()
    made = how | {"pretrained": scorer.pretrained, "weights": weights, "logit_scale": scorer.logit_scale}
    made |= {"bank": bank, "temperature": temperature, "texts": len(texts)}
    before = read_json(out / "embedding.json") if (out / "embedding.json").exists() else made
    if differ := [key for key in made if before.get(key) != made[key]]:
        raise ValueError(f"{out} was made with another {', '.join(differ)}: pass the same, or another folder.")
    files = files_to_read(source, out)
    write_file(out / "embedding.json", json.dumps(made | {"version": bsap_utils.__version__}, indent=1).encode())
    write_file(out / "auxiliary.parquet", pd.DataFrame({"text": texts, "feature": list(aux.numpy())}).to_parquet)
    decoding, encoder = (scorer.image_size, scorer.interpolation), (how, aux, temperature, weights)
    if files and not in_process:
        return write(out, over_ray(files, decoding, encoder, address))
    return write(out, map(Encoder(*encoder), read(files, *decoding)))


def write(out: Path, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, int]:
    """Write each batch as a file of its own, whole or not at all; and errors.parquet at the end."""
    errors, count, start = [pd.DataFrame(columns=["id", "source", "error"])], 0, time.time_ns()
    for number, batch in enumerate(batches):
        frame = pd.DataFrame(batch | {"feature": list(batch["feature"])})
        good, bad = frame[frame["error"] == ""].drop(columns="error"), frame[frame["error"] != ""]
        if len(good):
            write_file(out / f"features/{start}-{number:06d}.parquet", good.reset_index(drop=True).to_parquet)
        errors.append(bad[["id", "source", "error"]])
        count += len(good)
        print(f"  {count:,} pictures, {sum(map(len, errors)):,} that cannot be read (errors.parquet)", flush=True)
    wrong = pd.concat(errors, ignore_index=True)
    write_file(out / "errors.parquet", wrong.to_parquet)
    return {"images": count, "errors": len(wrong)}


def read_features(out: Path | str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Read what `embed` wrote: N ids, features [N, D] and biases [N]; of a source that was replaced, the last."""
    frame = pd.read_parquet(Path(out) / "features")
    frame = frame[frame["stamp"] == frame.groupby("source")["stamp"].transform("last")]
    return frame["id"].tolist(), torch.tensor(np.stack(frame["feature"])), torch.tensor(frame["bias"].to_numpy())
