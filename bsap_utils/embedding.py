"""Features of millions of images, for a `retrieval.BalancedIndex`: `bsap embed SOURCE OUT`, over Ray or in this process.

SOURCE is a folder (pictures, parquet with image bytes, WebDataset's tars) or one such file; OUT then holds

    features/*.parquet   id, source, stamp (size and mtime of the source), feature (D float32, a unit vector), bias (`pool`)
    errors.parquet       id, source, error: what could not be read
    auxiliary.parquet    text, feature: the bank behind the bias, and what any other method's shift is made of
    embedding.json       what made them

An id is the path in SOURCE, a tar member's name without suffix, or a parquet column `id`, `image_id`, `key` or `__key__`,
else file and row. The next run makes only what is not in OUT with the same stamp. The readers are ours: Ray's end at the
first broken picture or member, and know no names that are not UTF-8; Ray moves the pixels and runs the encoders.
"""

import importlib.util
import json
import logging
import os
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchvision.transforms.v2.functional import pil_to_tensor

import bsap_utils
from bsap_utils import __version__
from bsap_utils.aux_prompts import auxiliary_prompts
from bsap_utils.datasets import open_picture, read_json, write_file
from bsap_utils.normalization import shift_and_scale_from_features
from bsap_utils.scoring import TEMPLATE, ClipScorer
from bsap_utils.visual_prompts import squash

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
ASIDE = {"__macosx", "@eadir", "thumbnails"}  # folders of tools, beside all that is hidden
ROWS, LARGEST = 256, 200_000_000  # images decoded at a time, 37 MiB of pixels at 224 x 224; bytes of a picture in a tar
Row = tuple[str, Any]  # id, and bytes, a path or what was wrong
Batch = dict[str, np.ndarray]  # one row an image


def text_of(name: Any, otherwise: str) -> str:
    """An id as text: 581857.0 is "581857", b"a" is "a"; `otherwise` where there is none, or one of over 1,000 letters.

    >>> text_of(581857.0, ""), text_of(b"a", ""), text_of(None, "file-000000003"), text_of("caf\\udce9", "")
    ('581857', 'a', 'file-000000003', 'caf\\\\xe9')
    """
    name = int(name) if isinstance(name, float) and name.is_integer() else name
    name = os.fsencode(name) if isinstance(name, str) else name
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
    return text if name is not None and name == name and 0 < len(text) <= 1000 else otherwise


def walk(folder: Path, seen: frozenset[Path] = frozenset()) -> Iterator[Path | None]:
    """The files of a folder in the order of their names, linked folders followed (loops once); None for what is left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in ASIDE:
            yield None
        elif path.is_dir():
            here = path.resolve()
            yield from [None] if here in seen else walk(path, seen | {here})
        else:
            yield path if path.suffix.lower() in SUFFIXES | {".tar", ".parquet"} and path.is_file() else None


def stamp(path: Path) -> str:
    """What tells a file from one that took its place."""
    about = path.stat()
    return f"{about.st_size}-{about.st_mtime_ns}"


def rows_of_tar(path: Path) -> Iterator[Row]:
    """The pictures of a tar; a member that cannot be read costs that member."""
    with tarfile.open(path, ignore_zeros=True) as archive:
        for member in archive:
            if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                content: Any = ValueError(f"{member.size:,} bytes are no picture")
                try:
                    content = archive.extractfile(member).read() if member.size <= LARGEST else content  # type: ignore[union-attr]
                except (tarfile.TarError, OSError) as error:
                    content = error
                yield text_of(member.name.rpartition(".")[0], path.stem), content


def rows_of_parquet(path: Path) -> Iterator[Row]:
    """The rows of a parquet file with a column `image` or `bytes`, of bytes or Hugging Face's struct {bytes, path}."""
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        image = next((name for name in ("image", "bytes") if name in names), None)
        key = next((name for name in ("id", "image_id", "key", "__key__") if name in names), None)
        if image is None:
            raise ValueError(f"it has no column image or bytes, but {', '.join(names)}")
        batches = file.iter_batches(ROWS, columns=list(filter(None, (image, key))))
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            content = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
            yield text_of(key and row[key], f"{path.stem}-{number:09d}"), content


def rows_of(files: list[str]) -> Iterator[tuple[str, str, str, Any]]:
    """Id, source, stamp and content of all pictures of `files` that are not done; what breaks off ends in an error."""
    for root, name, mark, done in map(json.loads, files):
        path, source = Path(root, name), text_of(name, name[-1000:])
        read = {".tar": rows_of_tar, ".parquet": rows_of_parquet}.get(path.suffix.lower())
        try:
            for key, content in read(path) if read else [(source, path)]:
                if key not in done:
                    yield key, source, mark, content
        except Exception as error:  # damaged tars and parquet raise nearly anything
            yield "", source, mark, error


def decode(content: Any, size: Any, interpolation: str) -> tuple[torch.Tensor | None, str]:
    """A picture, upright and squashed to the model's square, uint8 [3, S, S], and ""; or None and what was wrong."""
    try:
        if isinstance(content, Exception) or not content:
            raise content or ValueError("no bytes")
        return squash(pil_to_tensor(open_picture(content, upright=True)), size, interpolation), ""
    except Exception as error:  # of a decoder, or handed on from the reader
        return None, str(error).replace(os.fspath(content), "") if isinstance(content, Path) else str(error)


def read(files: list[str], size: Any, interpolation: str) -> Iterator[Batch]:
    """Decode the pictures of `files`, ROWS at a time: id, source, stamp, error, pixels (black where there is an error)."""
    rows, blank = rows_of(files), torch.zeros(3, *((size, size) if isinstance(size, int) else size), dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while part := list(islice(rows, ROWS)):
            *about, contents = zip(*part, strict=True)
            pixels, errors = zip(*pool.map(lambda one: decode(one, size, interpolation), contents), strict=True)
            columns = dict(zip(("id", "source", "stamp", "error"), map(np.array, (*about, errors)), strict=True))
            yield columns | {"pixels": torch.stack([blank if one is None else one for one in pixels]).numpy()}


class Encoder:
    """A scorer that replaces the pixels of a batch by feature and bias, in this process or as an actor of Ray."""

    def __init__(self, how: dict[str, Any], aux_features: torch.Tensor, temperature: float, weights: str) -> None:
        self.scorer, self.aux, self.temperature = ClipScorer(**how, cache=False), aux_features, temperature
        if self.scorer.weights_hash() != weights:
            raise ValueError(f"{how['model']} has other weights on this node than where the job began.")

    def __call__(self, batch: Batch) -> Batch:
        """Encode one batch."""
        scale, features = self.scorer.logit_scale, self.scorer.encode_images(torch.tensor(batch.pop("pixels")))
        bias = shift_and_scale_from_features(features, self.aux, scale, temperature=self.temperature)[0]
        return batch | {"feature": features.numpy(), "bias": bias.float().numpy()}


def over_ray(files: list[str], decoding: tuple, encoder: tuple, address: str) -> Iterator[Batch]:
    """Read in tasks and encode in a pool of actors, one a GPU, else one for two CPUs: each picture once, in any order."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
    import ray

    if not ray.is_initialized():  # the nodes of a cluster need what is in pyproject.toml; this package is sent to them
        there = {"address": address, "runtime_env": {"py_modules": [bsap_utils]}}
        how = there if address else {"address": "local", "include_dashboard": False}
        try:
            ray.init(**how, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # a time-out of its own start is a bare Exception
            raise ValueError(
                f"Ray {address} cannot be started or joined: {error} Try again, or use --local."
            ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    # an actor leaves CPUs to the tasks that read: did the actors claim all of them, nobody could ever read
    claims = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 0.25 if cpus > 1 else 0}
    model = encoder[0] | {"device": "cuda" if gpus else "cpu"}
    pool = ray.data.ActorPoolStrategy(size=min(gpus or max(cpus // 2, 1), len(files)))
    work = ray.data.from_items([{"file": file} for file in files], override_num_blocks=min(len(files), 16 * cpus))
    pixels = work.map_batches(lambda batch: read(batch["file"].tolist(), *decoding), batch_size=ROWS)
    done = pixels.map_batches(
        Encoder, fn_constructor_args=(model, *encoder[1:]), batch_size=None, compute=pool, **claims
    )
    yield from done.iter_batches(batch_size=None, batch_format="numpy")


def vectors(features: np.ndarray) -> pa.Array:
    """Features [N, D] as a column of lists of float32."""
    return pa.FixedSizeListArray.from_arrays(pa.array(features.astype(np.float32).ravel()), features.shape[1])


def read_features(out: Path | str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Read what `embed` wrote: N ids, features [N, D] and biases [N]; of a source that was replaced, the last."""
    table = pq.read_table(Path(out) / "features")
    marks = table.select(["source", "stamp"]).to_pandas()
    last = marks["stamp"] == marks.groupby("source")["stamp"].transform("last")
    table = table.filter(pa.array(last))
    features = np.stack(table["feature"].to_numpy()) if len(table) else np.empty((0, 0), np.float32)
    return table["id"].to_pylist(), torch.tensor(features), torch.tensor(table["bias"].to_numpy())


def embed(source: Path, out: Path, model: str = "ViT-B-32", pretrained: str = "openai", bank: str = "coco80",
          temperature: float = 1.0, local: bool = False, address: str = "") -> dict[str, int]:  # fmt: skip
    """Write features and biases of all pictures of `source` to `out` (the module says how); return what was made.

    With Ray installed it runs over the cluster at `address`, else over this machine; without Ray, or `local`, in this
    process. On a cluster every node must see `source` and the model under the same path. Raises ValueError, ModelError.
    """
    source, out, ray_here = Path(source).resolve(), Path(out).resolve(), importlib.util.find_spec("ray") is not None
    if not source.exists() or out.is_relative_to(source):
        raise ValueError(f"{source}: no such file or folder, or {out} lies in it, which the next run would read.")
    if address and not ray_here:
        raise ValueError("A cluster needs Ray: pip install 'bsap-utils[scale]'. Without --address it runs here.")
    how: dict[str, Any] = {"model": model, "pretrained": pretrained, "precision": "auto"}
    scorer = ClipScorer(**how, device="auto" if local or not ray_here else "cpu", cache=False)
    texts = [TEMPLATE.format(text.lower()) for text in auxiliary_prompts(bank)]
    aux_features, weights = scorer.encode_texts(texts), scorer.weights_hash()
    made = {"model": model, "pretrained": scorer.pretrained, "weights": weights, "logit_scale": scorer.logit_scale,
            "bank": bank, "temperature": temperature, "texts": len(texts)}  # fmt: skip
    before = read_json(out / "embedding.json") if (out / "embedding.json").exists() else made
    if differ := [key for key in made if before.get(key) != made[key]]:
        raise ValueError(f"{out} was made with another {', '.join(differ)}: features of both would not compare. "
                         "Take the same, or another folder.")  # fmt: skip
    done: dict[tuple[str, str], list[str]] = {}
    for path in sorted((out / "features").glob("*.parquet")):
        for row in pq.read_table(path, columns=["id", "source", "stamp"]).to_pylist():
            done.setdefault((row["source"], row["stamp"]), []).append(row["id"])
    found: list[Path | None] = [source] if source.is_file() else [*walk(source, frozenset({source}))]
    root, files = source.parent if source.is_file() else source, []
    for path in filter(None, found):
        name, mark = path.relative_to(root).as_posix(), stamp(path)
        ids = done.get((text_of(name, name[-1000:]), mark), [])
        if not ids or path.suffix.lower() in (".tar", ".parquet"):
            files.append(json.dumps([str(root), name, mark, ids]))
    print(f"{source}: {len(files):,} files to read, {sum(map(len, done.values())):,} pictures done; "
          f"{found.count(None):,} others left aside", flush=True)  # fmt: skip
    write_file(out / "embedding.json", json.dumps(made | {"version": __version__}, indent=1).encode())
    bank_table = pa.table({"text": texts, "feature": vectors(aux_features.numpy())})
    write_file(out / "auxiliary.parquet", lambda part: pq.write_table(bank_table, part))
    decoding, encoder = (scorer.image_size, scorer.interpolation), (how, aux_features, temperature, weights)
    if local or not ray_here:
        here = Encoder(how | {"device": str(scorer.device)}, *encoder[1:])
        parts = (batch for i in range(0, len(files), ROWS) for batch in read(files[i : i + ROWS], *decoding))
        batches: Iterator[dict[str, np.ndarray]] = map(here, parts)
    else:
        batches = over_ray(files, decoding, encoder, address) if files else iter(())
    return write(out, batches)


def write(out: Path, batches: Iterator[Batch]) -> dict[str, int]:
    """Write each batch as a file of its own, whole or not at all; and errors.parquet at the end."""
    errors, count, start = [], 0, time.time_ns()
    (out / "features").mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(batches):
        wrong = batch["error"] != ""
        columns = {key: batch[key][~wrong] for key in ("id", "source", "stamp", "bias")}
        columns["feature"] = vectors(batch["feature"][~wrong])
        table = pa.table(columns)
        if len(table):
            write_file(out / f"features/{start}-{number:06d}.parquet", partial(pq.write_table, table))
        errors += [{key: str(batch[key][i]) for key in ("id", "source", "error")} for i in np.flatnonzero(wrong)]
        count += len(table)
        print(f"  {count:,} pictures, {len(errors):,} that cannot be read", flush=True)
    schema = pa.schema([(key, pa.string()) for key in ("id", "source", "error")])
    write_file(out / "errors.parquet", lambda part: pq.write_table(pa.Table.from_pylist(errors, schema), part))
    if errors:
        print(f"errors.parquet names them, e.g. {errors[0]['id'] or errors[0]['source']}: {errors[0]['error']}")
    return {"images": count, "errors": len(errors)}
