"""Features of millions of images, for a `retrieval.BalancedIndex`: `bsap embed SOURCE OUT`, in this process or over Ray.

SOURCE is a folder of images (id: the path in it), parquet with image bytes (a column `image` or `bytes`, or Hugging Face's
struct {bytes, path}; id: the column `id`, `image_id`, `key` or `__key__`, else file and row), or WebDataset's tars (id: the
member's name without its suffix). OUT then holds

    features/*.parquet   id, feature (D float32, a unit vector), bias (float32, `region_bias`): one file a shard of SOURCE
    errors.parquet       id, shard, error: the images that could not be read
    auxiliary.parquet    text, feature: the bank behind the bias, and what any other method's shift is made of
    embedding.json       what made them: model, hash of its weights, precision, logit scale, bank, temperature, versions

SOURCE is cut into the same shards each time. A shard is written to a temporary name and renamed when it is complete; the
next run makes only those that are not there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import os
import platform
import tarfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as transforms

from . import __version__
from .aux_prompts import auxiliary_prompts
from .normalization import region_bias_from_features
from .scoring import TEMPLATE, ClipScorer
from .visual_prompts import squash

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
IMAGE_COLUMNS, ID_COLUMNS = ("image", "bytes"), ("id", "image_id", "key", "__key__")
ROWS = 256  # images decoded at a time: 37 MiB of pixels at 224 × 224
ERRORS = pa.schema([(column, pa.string()) for column in ("id", "shard", "error")])
Batch = dict[str, np.ndarray]  # one row an image
Shard = dict[str, Any]
say = partial(print, flush=True)


class EmbeddingError(RuntimeError):
    """A source, a folder or a cluster that cannot be used. The message says what to do."""


def plan(source: Path, shard_size: int = 1024) -> tuple[list[Shard], int]:
    """Cut a source into shards, and count the files that were left aside: a folder's tars go before its parquet and images.

    A shard is `shard_size` images of a folder in the order of their names, the row groups of a parquet file that begin
    within the same `shard_size` rows, or a whole tar. Its name ends in a hash of what it holds. Raises EmbeddingError.
    """
    if not source.exists():
        raise EmbeddingError(f"{source}: no such file or folder.")
    root = source.parent if source.is_file() else source
    found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if not path.is_dir())
    of_kind = [[p for p in found if p.suffix.lower() in kind] for kind in ({".tar"}, {".parquet"}, SUFFIXES)]
    paths = next(filter(None, of_kind), [])
    shards: list[Shard]
    if paths and paths == of_kind[-1]:
        files = [path.relative_to(root).as_posix() for path in paths]
        shards = [{"name": f"images-{start:09d}", "path": "", "files": files[start : start + shard_size]}
                  for start in range(0, len(files), shard_size)]  # fmt: skip
    else:
        shards = [shard for path in paths for shard in _of_file(path, path.relative_to(root), shard_size)]
    if not shards:
        raise EmbeddingError(f"{source} has no images: no row in parquet, no tar, and no file that ends in one of "
                             f"{' '.join(sorted(SUFFIXES))} ({len(found):,} files in all).")  # fmt: skip
    for shard in shards:
        shard["name"] += "-" + hashlib.sha256(json.dumps(shard).encode()).hexdigest()[:8]
        shard["path"] = str(root / shard["path"])  # after the hash: the source may have moved by the next run
    return shards, len(found) - len(paths)


def _of_file(path: Path, name: Path, shard_size: int) -> Iterator[Shard]:
    """The shards of a tar or a parquet file."""
    shard: Shard = {"name": name.with_suffix("").as_posix().replace("/", "--"), "path": name.as_posix()}
    if path.suffix.lower() == ".tar":
        yield shard | {"size": path.stat().st_size}
        return
    try:
        described = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise EmbeddingError(f"{path} is damaged, or no parquet: {error}. Get it again, or take it away.") from error
    schema = described.schema.to_arrow_schema()
    if not _image_column(schema):
        raise EmbeddingError(f"{path} has no column {' or '.join(IMAGE_COLUMNS)} of bytes, but {', '.join(schema.names)}. "
                             "Rename the one that has the images.")  # fmt: skip
    rows = [described.row_group(i).num_rows for i in range(described.num_row_groups)]
    starts = np.cumsum([0, *rows])
    for number, together in groupby((i for i, n in enumerate(rows) if n), lambda i: starts[i] // shard_size):
        groups = list(together)
        here = {"groups": groups, "rows": [rows[i] for i in groups], "first": int(starts[groups[0]])}
        yield shard | {"name": f"{shard['name']}-{number:05d}"} | here


def _image_column(schema: pa.Schema) -> str | None:
    """The column with bytes, or a struct with `bytes` in it."""
    kinds = {name: schema.field(name).type for name in IMAGE_COLUMNS if name in schema.names}
    inner = {name: [f.type for f in kind if f.name == "bytes"] if pa.types.is_struct(kind) else [kind]
             for name, kind in kinds.items()}  # fmt: skip
    return next((n for n, kind in inner.items() if kind and kind[0] in (pa.binary(), pa.large_binary())), None)


def _images(shard: Shard) -> Iterator[tuple[str, bytes | Path | None]]:
    """The id of each image of a shard, and its bytes or path."""
    path = Path(shard["path"])
    if "files" in shard:
        yield from ((name, path / name) for name in shard["files"])
    elif "groups" in shard:
        with pq.ParquetFile(path) as file:
            image = _image_column(file.schema_arrow)
            key = [name for name in ID_COLUMNS if name in file.schema_arrow.names][:1]
            batches = file.iter_batches(ROWS, row_groups=shard["groups"], columns=[image, *key])
            for row, values in enumerate((row for batch in batches for row in batch.to_pylist()), shard["first"]):
                content = values[image]
                content = content["bytes"] if isinstance(content, dict) else content
                yield str(values[key[0]]) if key else f"{path.stem}-{row:09d}", content
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    yield member.name.rpartition(".")[0], archive.extractfile(member).read()  # type: ignore[union-attr]


def _images_or_error(shard: Shard) -> Iterator[tuple[str, bytes | Path | None | Exception]]:
    """`_images`; a shard that breaks off, or has no image, ends in a row that says so, and the job goes on."""
    count = 0
    try:
        for count, image in enumerate(_images(shard), 1):  # noqa: B007
            yield image
        if not count:
            yield "", EmbeddingError("no image in it")
    except Exception as error:  # damaged tars and parquet raise nearly anything
        yield "", EmbeddingError(f"cannot be read on after {count} images: {type(error).__name__}: {error}")


def decode(content: bytes | Path | None | Exception, size: int | tuple[int, int]) -> tuple[torch.Tensor | None, str]:
    """Decode an image and squash it to the model's square: [3, size, size] uint8 and "", or None and what was wrong.

    >>> decode(b"no image", 64)
    (None, 'no image of a known kind')
    """
    try:
        if isinstance(content, Exception):
            raise content
        content = content.read_bytes() if isinstance(content, Path) else content
        if not content:
            raise EmbeddingError("no bytes")
        try:
            pixels = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:  # of a kind that only PIL knows; or broken, and PIL's reason is easier to read
            pixels = transforms.pil_to_tensor(Image.open(io.BytesIO(content)).convert("RGB"))
        pixels = pixels[0] if pixels.ndim == 4 else pixels  # the first picture of an animation
        return squash(transforms.to_dtype(pixels, torch.uint8, scale=True), size), ""  # a PNG may have 16 bits
    except UnidentifiedImageError:  # its own message is an address in memory
        return None, "no image of a known kind"
    except Exception as error:  # PIL's decoders raise nearly anything on damaged bytes
        return None, str(error) if isinstance(error, EmbeddingError) else f"{type(error).__name__}: {error}"


def read(shards: Iterable[Shard], size: int | tuple[int, int], threads: int = 1) -> Iterator[Batch]:
    """Decode shards, at most `ROWS` images of one a batch: shard, place in it, total (in its last row), id, error, pixels.

    `threads` decode the next batch while the caller works on this one. The pixels of a broken image are black.
    """
    blank = torch.zeros(3, *([size, size] if isinstance(size, int) else size), dtype=torch.uint8)
    with ThreadPoolExecutor(threads) as pool:

        def started() -> Iterator[tuple[str, list]]:
            for shard in shards:
                images = _images_or_error(shard)
                while part := list(islice(images, ROWS)):
                    yield shard["name"], [(name, pool.submit(decode, content, size)) for name, content in part]

        done = 0
        for (shard, part), (next_shard, _) in pairwise(chain(started(), [("", [])])):
            ids, results = zip(*((name, future.result()) for name, future in part), strict=True)
            place = np.arange(done, done + len(ids))
            total = np.where((place == place[-1]) & (shard != next_shard), len(ids) + done, 0)
            done = 0 if shard != next_shard else done + len(ids)
            yield {"shard": np.full(len(ids), shard), "place": place, "total": total, "id": np.array(ids),
                   "error": np.array([error for _, error in results]),
                   "pixels": torch.stack([blank if pixels is None else pixels for pixels, _ in results]).numpy()}  # fmt: skip


def encode(scorer: ClipScorer, batch: Batch, aux_features: torch.Tensor, temperature: float) -> Batch:
    """Replace the pixels of a batch by feature [n, D] and bias [n], in this process or in an actor's."""
    features = scorer.encode_images(torch.tensor(batch["pixels"]))
    bias = region_bias_from_features(features, aux_features, scorer.logit_scale, temperature)
    worker = np.full(len(bias), f"{platform.node()}:{os.getpid()}")
    rest = {key: values for key, values in batch.items() if key != "pixels"}
    return rest | {"feature": features.numpy(), "bias": bias.numpy(), "worker": worker}


class Encoder:
    """`encode` as an actor of Ray, with a scorer of its own (`arguments`) and the weights that the job began with."""

    def __init__(self, arguments: dict[str, Any], weights: str, *rest: Any) -> None:
        if arguments["device"] == "cpu":
            torch.set_num_threads(2)  # there is one encoder for two CPUs
        self.scorer, self.rest = ClipScorer(**arguments), rest
        if self.scorer.weights_hash() != weights:
            raise EmbeddingError(
                f"{arguments['model']} has other weights on {platform.node()} than the job began with."
            )

    def __call__(self, batch: Batch) -> Batch:
        return encode(self.scorer, batch, *self.rest)


def _connect(address: str, num_gpus: int | None) -> tuple[int, int]:
    """Start Ray on this machine, or join the cluster at `address`: its CPUs, and the GPUs to use."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to Ray's makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong comes back as an exception, too
    import ray

    if not ray.is_initialized():
        import bsap_utils

        # the nodes of a cluster need what is in pyproject.toml, but not this package: it is sent to them
        how: dict[str, Any] = {"address": "local", "include_dashboard": False}
        if address:
            how = {"address": address, "runtime_env": {"py_modules": [bsap_utils]}}
        try:
            ray.init(**how, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # a time-out of its own start is a bare Exception
            what = f"Ray's cluster at {address} cannot be joined" if address else "Ray cannot be started here"
            raise EmbeddingError(f"{what}: {error} Try again, ask `ray status` on its head, or use --local.") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    if (num_gpus or 0) > gpus:
        raise EmbeddingError(f"{num_gpus} GPUs were asked for, but Ray has {gpus}. Ask for fewer; 0 computes on CPUs.")
    return cpus, gpus if num_gpus is None else num_gpus


def _over_ray(todo: list[Shard], size: int | tuple[int, int], cpus: int, gpus: int, *encoder: Any) -> Iterator[Batch]:
    """Read the shards in tasks and encode them in a pool of actors: each image once, in any order, whoever dies."""
    import ray

    # A task that reads must claim a CPU to start. Did the actors hold all of them, nobody could ever read, and the job would
    # stand still for good. So an actor with a GPU claims no CPU, nor does the only one on a single CPU; else there is one
    # actor for two CPUs and it claims a quarter: too few and too little to leave no node with a whole CPU free. A claim
    # only says who may start; all CPUs are put to work.
    claims = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 0.25 if cpus > 1 else 0}
    pool = ray.data.ActorPoolStrategy(size=min(gpus or max(cpus // 2, 1), len(todo)))
    work = ray.data.from_items([{"shard": json.dumps(shard)} for shard in todo], override_num_blocks=len(todo))
    pixels = work.map_batches(lambda row: read(map(json.loads, row["shard"]), size), batch_size=1, num_cpus=1)
    features = pixels.map_batches(Encoder, batch_size=None, compute=pool, fn_constructor_args=encoder, **claims)
    try:
        yield from features.iter_batches(batch_size=None, batch_format="numpy")
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise EmbeddingError(f"Ray stopped: {reason}. What is complete is kept; the same command goes on.") from error


def _whole_shards(batches: Iterable[Batch]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Gather batches, of several shards and in any order, to whole shards in the order of their images."""
    waiting: dict[str, list[pd.DataFrame]] = {}
    for batch in batches:
        frame = pd.DataFrame(batch | {"feature": list(batch["feature"])})
        for name, rows in frame.groupby("shard"):
            waiting.setdefault(name, []).append(rows)
            if max(part["total"].max() for part in waiting[name]) == sum(map(len, waiting[name])):
                yield name, pd.concat(waiting.pop(name)).sort_values("place")


def _write(path: Path, table: pa.Table) -> None:
    part = path.with_name(f".{path.name}.part")
    pq.write_table(table, part)
    os.replace(part, path)


def _feature_column(features: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(features.ravel(), pa.float32()), features.shape[1])


def read_features(out: Path | str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Read what `embed` wrote, shards in the order of their names: N ids, features [N, D] and biases [N]."""
    table = pq.read_table(Path(out) / "features")
    column = table["feature"].combine_chunks()
    features = torch.tensor(column.flatten().to_numpy()).view(len(table), column.type.list_size)
    return table["id"].to_pylist(), features, torch.tensor(table["bias"].to_numpy())


def embed(source: Path | str, out: Path | str, model: str = "ViT-B-32", pretrained: str = "openai", *,
          num_gpus: int | None = None, local: bool = False, address: str = "", bank: str = "coco80",
          temperature: float = 1.0, precision: str = "auto", shard_size: int = 1024) -> dict[str, int]:  # fmt: skip
    """Write features and biases of all images of `source` to `out` (the module says how), and return the counts.

    With Ray installed, it runs over the cluster at `address` (or RAY_ADDRESS; "auto" is one that runs on this machine; ""
    starts one here), with an actor for each of `num_gpus` GPUs (None: all there are; 0: on CPUs); without Ray, or `local`,
    in this process. On a cluster, every node must see `source` and the model under the same full path; `out` is written by
    the process that calls. `bank` is `coco80`, `generic` or a text file, one auxiliary prompt a line; `temperature` is that
    of the bias, which leaves SigLIP's logit bias out. `precision="auto"` is bf16 on GPUs, else fp32. Raises EmbeddingError,
    ModelError, ValueError.
    """
    source, out = Path(source).resolve(), Path(out).resolve()
    if out.is_relative_to(source):
        raise EmbeddingError(f"{out} lies in {source}: the next run would read what this one wrote. Choose another.")
    shards, aside = plan(source, shard_size)
    say(f"{source}: {len(shards):,} shards" + (f"; {aside:,} other files were left aside" if aside else ""))
    address = address or os.environ.get("RAY_ADDRESS", "")
    with_ray = not local and importlib.util.find_spec("ray") is not None
    if address and not local and not with_ray:
        raise EmbeddingError("Ray is not installed here: pip install 'bsap-utils[scale]', or use --local.")
    cpus, gpus = _connect(address, num_gpus) if with_ray else (0, 0)
    if with_ray and precision == "auto":  # the same on all nodes
        precision = "bf16" if gpus else "fp32"
    # the driver of Ray only encodes the bank: it may run on a cluster's head, which often has no GPU
    scorer = ClipScorer(model, pretrained, "cpu" if with_ray or num_gpus == 0 else "auto", precision)
    texts = [TEMPLATE.format(text.lower()) for text in auxiliary_prompts(bank)]
    aux_features, weights = scorer.encode_texts(texts), scorer.weights_hash()
    region_bias_from_features(aux_features, aux_features, scorer.logit_scale, temperature)  # refuses now, not later
    made = {"model": model, "pretrained": pretrained if scorer.pretrained else "", "weights": weights,
            "precision": scorer.precision, "dimensions": aux_features.shape[1], "logit_scale": scorer.logit_scale,
            "logit_bias": scorer.logit_bias, "temperature": temperature, "bank": bank,
            "texts_hash": hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]}  # fmt: skip
    _check_same(out / "embedding.json", made)
    there = {path.stem for path in (out / "features").glob("*.parquet")}
    strange = sorted(there - {shard["name"] for shard in shards})
    if strange:
        raise EmbeddingError(f"{len(strange):,} files in {out / 'features'}, e.g. {strange[0]}.parquet, are of no shard that "
                             f"{source} has now: it, or the shard size, has changed. Remove them, or choose another "
                             "folder.")  # fmt: skip
    (out / "features").mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, open_clip)}
    part = out / ".embedding.json.part"
    part.write_text(json.dumps(made | {"versions": {"bsap_utils": __version__, **versions}}, indent=1) + "\n", "utf-8")
    os.replace(part, out / "embedding.json")
    _write(out / "auxiliary.parquet", pa.table({"text": texts, "feature": _feature_column(aux_features.numpy())}))
    todo = [shard for shard in shards if shard["name"] not in there]
    where = f"over Ray: {cpus} CPUs, {gpus} GPUs" if with_ray else f"in this process, on {scorer.device}"
    say(f"{len(there):,} shards are there already, {len(todo):,} to do {where}")
    if with_ray and todo:
        actor = {"model": model, "pretrained": pretrained, "device": "cuda" if gpus else "cpu", "precision": precision}
        batches = _over_ray(todo, scorer.image_size, cpus, gpus, actor, weights, aux_features, temperature)
    else:
        here = read(todo, scorer.image_size, threads=os.cpu_count() or 1)
        batches = (encode(scorer, batch, aux_features, temperature) for batch in here)
    return _write_shards(out, there, len(todo), aux_features.shape[1], batches)


def _check_same(path: Path, made: dict[str, Any]) -> None:
    """Raise EmbeddingError where other settings made what is in the folder."""
    try:
        before = json.loads(path.read_text("utf-8")) if path.exists() else made
        differ = [f"{key} was {before.get(key)!r}, is {made[key]!r}" for key in made if before.get(key) != made[key]]
    except (ValueError, AttributeError) as error:
        raise EmbeddingError(f"{path} is damaged ({error}): what made its folder is unknown. Choose another.") from None
    if differ:
        raise EmbeddingError(f"{path.parent} was made with other settings: {'; '.join(differ)}. Features of both would not "
                             "compare: take the same settings, or another folder.")  # fmt: skip


def _write_shards(out: Path, there: set[str], todo: int, dimensions: int, batches: Iterable[Batch]) -> dict[str, int]:
    log, errors, made, start = out / "errors.parquet", [], 0, time.monotonic()
    if log.exists():  # a shard's errors are written before it, so there may be some of one that was interrupted
        errors = [row for row in pq.read_table(log).to_pylist() if row["shard"] in there]
    for number, (name, rows) in enumerate(_whole_shards(batches), 1):
        good, broken = (rows[(rows["error"] != "") == wrong] for wrong in (False, True))
        if len(broken):
            errors += broken[ERRORS.names].to_dict("records")
            _write(log, pa.Table.from_pylist(errors, ERRORS))
        features = np.stack(good["feature"]) if len(good) else np.empty((0, dimensions))
        columns = [pa.array(good["id"], pa.string()), _feature_column(features), pa.array(good["bias"], pa.float32())]
        _write(out / "features" / f"{name}.parquet", pa.table(columns, ["id", "feature", "bias"]))
        made += len(good)
        workers = ", ".join(sorted(set(rows["worker"])))
        say(f"[{number:,}/{todo:,}] {name}: {len(good):,} images, {len(broken):,} broken, by {workers}")
    rate = made / max(time.monotonic() - start, 1e-9)
    _write(log, pa.Table.from_pylist(errors, ERRORS))
    ids = pq.read_table(out / "features", columns=["id"])["id"]
    twice = len(ids) - len(ids.unique())
    say(f"{len(ids):,} images are in {out / 'features'}, {made:,} of them new ({rate:,.0f} a second)")
    if errors:
        first = errors[0]
        say(
            f"{len(errors):,} could not be read (errors.parquet), e.g. {first['id'] or first['shard']}: {first['error']}"
        )
    if twice:
        say(f"{twice:,} ids are not the first of their name. All are kept: a search may return the same id twice.")
    return {"images": len(ids), "errors": len(errors), "duplicates": twice}
