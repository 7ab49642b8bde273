"""CLIP scoring: each region and each distinct text encoded once, and the logits that every correction starts from.

Features are kept on disk, so that a second run encodes nothing. A file `SPACE-DIGEST.safetensors` of the cache holds the
features of a group of images (or texts) and their keys: SPACE is a digest of all that they depend on (weights, model,
visual prompt and its code, precision, versions), DIGEST one of the file's bytes. A key is a digest of the picture's
bytes, the box and, for prompts that show it, the mask: whoever replaces, moves or copies a picture cannot be fooled.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import inspect
import json
import os
import re
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import httpx
import huggingface_hub
import numpy as np
import open_clip
import pandas as pd
import safetensors.torch
import torch
import torchvision
from huggingface_hub import constants as hub
from PIL import Image
from torch.nn.functional import normalize
from torchvision.transforms.v2 import functional as transforms
from tqdm.auto import tqdm

from . import ROOT, visual_prompts
from .datasets import XYWH, DatasetError, ReferDataset, open_picture, write_file
from .global_local import encode_masked, has_patch_tokens
from .regions import Pairs, decode_masks
from .visual_prompts import MASK_PROMPTS, VISUAL_PROMPTS, check_prompts, patch_masks, show_regions, squash

Item = TypeVar("Item")
Result = TypeVar("Result")
Picture = Path | str | bytes | BinaryIO | Image.Image | torch.Tensor
TEMPLATE = "a photo of {}"  # ReCLIP's text: "a photo of " + the expression in lower case
SAMPLE_MODEL = "local-dir:data/clip-refshapes"
PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16")
VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
SHARD = re.compile(r"\.?[0-9a-f]{32}-[0-9a-f]{32}(\.\d+\.part)?\.safetensors")


class ModelError(RuntimeError):
    """A model that cannot be used: unknown, without weights, or not reachable. The message says what to do."""


# Models by name


def pick_device(device: str = "auto") -> torch.device:
    """Return the device to compute on: "auto" takes CUDA, then Apple MPS, then the CPU. Raises ModelError.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(kind for kind, found in there.items() if found))
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelError(f"device={device!r} is none: use auto, cpu, cuda or mps.") from None
    if not there.get(chosen.type, True) or (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"device={device!r} was asked for, and PyTorch finds none here: use device='auto' or 'cpu'.")
    return chosen


def pick_precision(precision: str, device: torch.device) -> str:
    """Return open_clip's name of the precision: "auto" is bf16 on a GPU that has it, else fp32. Raises ModelError.

    >>> pick_precision("auto", torch.device("cpu"))
    'fp32'
    """
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision not in PRECISIONS:
        raise ModelError(f"precision={precision!r} is unknown: use auto, {', '.join(PRECISIONS)}.")
    return precision


def network_problem() -> str:
    """Return what is wrong with the environment's network variables, naming the first such; "" where nothing is."""
    for name in CERTIFICATES:
        if (value := os.environ.get(name)) and not Path(value).exists():
            return f"{name}={value} is no file here: correct or unset it"
    for name in VARIABLES:
        value = os.environ.get(name, "")
        try:
            httpx.Client(proxy=value if "://" in value else f"http://{value}").close() if value else None
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            return f"{name}={value} cannot be used as a proxy ({error}): set it to http://HOST:PORT, or unset it"
    with contextlib.suppress(ValueError):
        if (parts := urlsplit(hub.ENDPOINT)).scheme in ("http", "https") and parts.hostname:
            return ""
    return f"HF_ENDPOINT={hub.ENDPOINT} is no address: set it to one like https://huggingface.co, or unset it"


def hub_problem() -> str:
    """Return why the Hugging Face hub does not answer, "" where it does. Asks once, for three seconds at most.

    Its own client would go on trying for half a minute.
    """
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if problem := network_problem():
        return problem
    try:
        httpx.head(hub.ENDPOINT, timeout=3)
    except (httpx.HTTPError, OSError):
        return f"{hub.ENDPOINT} cannot be reached"
    return ""


def where_to_get(model: str, pretrained: str) -> str:
    """Return what to download, from where, and how to use it on a machine without a network."""
    if model.startswith("hf-hub:"):
        repository, file = model.removeprefix("hf-hub:"), "all its files"
        use = "put them into a folder and use model='local-dir:FOLDER'"
    else:
        record = open_clip.get_pretrained_cfg(model, pretrained)
        repository, _, file = record.get("hf_hub", "").rpartition("/")
        file = file or "open_clip_model.safetensors"
        use = f"use model={_with_gelu(model, record)!r}, pretrained='PATH/TO/FILE'"
        if not repository:
            return f"download {record.get('url')} on a machine with a network and {use}"
    return f"on a machine with a network download {file} of {hub.ENDPOINT}/{repository} and {use}"


def _with_gelu(model: str, record: dict) -> str:
    """Return the name under which open_clip computes what a record's weights were trained with."""
    twin = f"{model}-quickgelu"
    return twin if record.get("quick_gelu") and twin in open_clip.list_models() else model


def _nearest(name: str, known: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, 6, 0.3) or sorted(known)[:6])


def check_names(model: str, pretrained: str) -> None:
    """Raise ModelError, with the nearest known names, for what open_clip does not know or would load wrongly."""
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise ModelError(f"{folder}: no open_clip_config.json there. Give an open_clip model's folder, "
                             f"e.g. {SAMPLE_MODEL}.")  # fmt: skip
    if ":" in model:
        return
    if model not in open_clip.list_models():
        raise ModelError(f"open_clip has no model {model!r}. Nearest: {_nearest(model, open_clip.list_models())}. "
                         "Also possible: 'hf-hub:OWNER/NAME' or 'local-dir:FOLDER'.")  # fmt: skip
    tags = open_clip.list_pretrained_tags_by_model(model)
    record = open_clip.get_pretrained_cfg(model, pretrained)
    lacks = record.get("quick_gelu") and not open_clip.get_model_config(model).get("quick_gelu")
    if lacks and pretrained.lower() != "openai":  # everybody calls OpenAI's by the plain name, and gets QuickGELU
        raise ModelError(f"QuickGELU mismatch: the weights {pretrained!r} were trained with it, and {model} computes "
                         f"without. Use model={model + '-quickgelu'!r}.")  # fmt: skip
    if not record and not Path(pretrained).is_file():
        what = (
            f"{pretrained}: no such file"
            if "/" in pretrained
            else f"open_clip has no weights {pretrained!r} for {model}"
        )
        raise ModelError(f"{what}. Give a checkpoint file, or one of: {_nearest(pretrained, tags)}.")


def find_weights(model: str, pretrained: str = "openai") -> Path:
    """Return the file on this machine that `ClipScorer(model, pretrained)` takes its weights from. Raises ModelError.

    open_clip looks in Hugging Face's cache where its record names a repository, else in ~/.cache/clip.

    >>> find_weights("local-dir:data/clip-refshapes").name
    'open_clip_model.safetensors'
    """
    check_names(model, pretrained)
    record = {} if ":" in model else open_clip.get_pretrained_cfg(model, pretrained)
    source = f"{model.removeprefix('hf-hub:')}/" if model.startswith("hf-hub:") else record.get("hf_hub", "")
    repository, _, name = source.rpartition("/")
    if model.startswith("local-dir:"):
        place = Path(model.removeprefix("local-dir:"))
        found = [file for kind in ("safetensors", "bin", "pth") for file in sorted(place.glob(f"*.{kind}"))]
    elif repository:
        place = Path(hub.HF_HUB_CACHE)
        names = (Path(name).with_suffix(".safetensors").name, name) if name else WEIGHTS
        files = [huggingface_hub.try_to_load_from_cache(repository, one) for one in names]
        found = [Path(file) for file in files if isinstance(file, str)]
    else:
        place = Path("~/.cache/clip").expanduser() / record["url"].rpartition("/")[2] if record else Path(pretrained)
        found = [place] if place.is_file() else []
    if not found:
        raise ModelError(f"The weights of {model} {pretrained} are not in {place}: {where_to_get(model, pretrained)}.")
    return found[0]


def _check_gelu(model: str, file: Path) -> None:
    """Raise ModelError where a checkpoint is OpenAI's and the model computes plain GELU; warn where nobody can tell."""
    twin = f"{model}-quickgelu"
    if twin not in open_clip.list_models():
        return
    marks, weight = f"{file.name} {file.resolve()}", torch.zeros(0)
    with contextlib.suppress(Exception):  # what cannot be read is explained where it is loaded
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as content:
                marks += f" {content.metadata()}"
                weight = content.get_tensor("visual.conv1.weight")
        else:
            state = open_clip.factory.load_state_dict(str(file))
            marks += " openai" * ("input_resolution" in state)
            weight = state["visual.conv1.weight"]
    # OpenAI's were made in half precision, and still are such numbers when somebody stored them in single precision
    halves = (
        weight.dtype != torch.bfloat16 and bool(weight.any()) and torch.equal(weight.half().to(weight.dtype), weight)
    )
    if halves or re.search(r"\bopenai\b", marks, re.IGNORECASE):
        raise ModelError(f"{file} holds OpenAI's weights by its name, metadata or half-precision numbers: they were trained "
                         f"with QuickGELU, and {model} computes without. Use model={twin!r}; for others' weights, a "
                         "'local-dir:' folder, whose open_clip_config.json says it.")  # fmt: skip
    warnings.warn(f"{file} does not say what it was trained with, and {model} computes plain GELU. Where it is OpenAI's, "
                  f"MetaCLIP's or DFN's, use model={twin!r}.", stacklevel=4)  # fmt: skip


EXPLANATIONS = {
    "TorchScript": "it is a TorchScript archive, the form of OpenAI's own files, which holds code and is not opened. If you "
                   "trust it, save its weights once, torch.save(open_clip.load_openai_model({file!r}, device='cpu')"
                   ".state_dict(), 'NEW.pt'), and use those with a '-quickgelu' model; or use pretrained='openai'",
    "weights_only": "it is a training checkpoint with other objects (such as NumPy's) beside the weights, which are not "
                    "unpickled. If you trust it, save its weights alone: "
                    "torch.save(torch.load({file!r}, weights_only=False)['state_dict'], 'NEW.pt')",
}  # fmt: skip


def _load(model: str, pretrained: str, precision: str, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """Return open_clip's model, tokenizer and configuration. Raises ModelError."""
    check_names(model, pretrained)
    record = {} if ":" in model else open_clip.get_pretrained_cfg(model, pretrained)
    if not (record or ":" in model):
        _check_gelu(model, Path(pretrained))
    text = {} if model.startswith("hf-hub:") else open_clip.get_model_config(model).get("text_cfg", {})
    wants = record or model.startswith("hf-hub:") or "hf_model_name" in text or "hf_tokenizer_name" in text
    problem, before = hub_problem() if wants else "", hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or bool(problem)  # its cache then answers at once, without a try at the network
    what = f"{model} {pretrained}".strip()
    try:
        net = open_clip.create_model(model, pretrained or None, precision=precision, device=device, require_pretrained=True,
                                     force_quick_gelu=bool(record) and pretrained.lower() == "openai")  # fmt: skip
        what = f"the tokenizer {text.get('hf_tokenizer_name', '')} of {model}"
        return net, open_clip.get_tokenizer(model), open_clip.get_model_config(model)
    except Exception as error:
        said = " ".join(str(error).split())
        if "tokenizer" in what:
            remedy = "Put its tokenizer.json and tokenizer_config.json into the folder of a 'local-dir:' model"
            raise ModelError(f"{what} is not on this machine{problem and f', and {problem}'}. {remedy}.") from error
        if problem:
            raise ModelError(f"The weights of {what} are not on this machine, and {problem}. What to do: "
                             f"{where_to_get(model, pretrained)}, or use the sample's, {SAMPLE_MODEL!r}.") from error  # fmt: skip
        why = next((text.format(file=pretrained) for mark, text in EXPLANATIONS.items() if mark in said), said[:300])
        raise ModelError(
            f"{what} could not be loaded: {why}. Check that the file is whole and of this model."
        ) from error
    finally:
        hub.HF_HUB_OFFLINE = before


# Features on disk


def cache_folder() -> Path | None:
    """Return where features are kept: `BSAP_CACHE` where that is set (empty: nowhere, None), else data/cache of the clone."""
    given = os.environ.get("BSAP_CACHE", ROOT / "data/cache")
    return Path(given).resolve() if given != "" else None


def cache_files(pattern: str = "*") -> list[Path]:
    """Return the cache's own files: those whose names we made, in the folder itself, and no links."""
    found = folder.glob(pattern) if (folder := cache_folder()) else ()
    return sorted(path for path in found if SHARD.fullmatch(path.name) and path.is_file() and not path.is_symlink())


def cache_usage() -> tuple[int, int]:
    """Return how many files the cache has and how many bytes they take."""
    files = cache_files()
    return len(files), sum(path.stat().st_size for path in files)


def clear_cache() -> tuple[int, int]:
    """Delete the cache's files, unfinished ones too: (files, bytes). Anything else in its folder stays."""
    usage = cache_usage()
    for path in cache_files():
        path.unlink(missing_ok=True)
    return usage


def digest(*parts: Any) -> str:
    """Return 32 hexadecimal digits for bytes, or anything that JSON can write; equal for equal parts only.

    >>> digest("crop", [1.0, 2.0]) == digest("crop", [1.0, 2.0]), digest("ab", "c") == digest("a", "bc")
    (True, False)
    """
    content = parts[0] if isinstance(parts[0], bytes) else json.dumps(parts, default=str).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Store:
    """Features [N, width] on disk that depend on `about`, found by key; nothing is found or kept where `about` is None."""

    def __init__(self, about: dict[str, Any] | None, width: int) -> None:
        self.folder, self.about, self.width = cache_folder() if about else None, about, width
        self.space = digest(about)

    def find(self, keys: Sequence[str]) -> torch.Tensor:
        """Return the features [N, width] of N keys, NaN where they are not known."""
        features, rows_of = torch.full((len(keys), self.width), torch.nan), defaultdict(list)
        for row, key in enumerate(keys):
            rows_of[key].append(row)
        for path in cache_files(f"{self.space}-*.safetensors") if self.folder else ():
            stored, found = self._read(path)
            pairs = [(row, place) for place, key in enumerate(stored) for row in rows_of.get(key, ())]
            if pairs:
                rows, places = (list(one) for one in zip(*pairs, strict=True))
                features[rows] = found[places]
        return features

    def _read(self, path: Path) -> tuple[list[str], torch.Tensor]:
        """Return a file's keys and features. One that is damaged is removed; one that cannot be read is left."""
        try:
            content = path.read_bytes()
            if digest(content) != path.stem.rpartition("-")[2]:
                raise ValueError("its bytes are not those that were written")
            tensors = safetensors.torch.load(content)
            keys, features = tensors["keys"].numpy(), tensors["features"]
            if keys.shape != (len(features), 16) or features.shape[1] != self.width:
                raise ValueError("its tensors have another shape")
            return [key.tobytes().hex() for key in keys], features
        except (ValueError, KeyError, safetensors.SafetensorError) as error:
            with contextlib.suppress(OSError):  # in a read-only cache
                path.unlink()
            warnings.warn(
                f"{path}: this part of the feature cache is damaged ({error}); it is encoded again.", stacklevel=4
            )
        except (OSError, MemoryError) as error:
            warnings.warn(f"{path}: this part of the feature cache cannot be read now ({error}).", stacklevel=4)
        return [], torch.zeros(0, self.width)

    def keep(self, keys: Sequence[str], features: torch.Tensor) -> None:
        """Keep features [N, width] under N keys. A cache that cannot be written is a warning: the run goes on without."""
        finite = features.isfinite().all(1).tolist()
        rows = {key: row for row, key in enumerate(keys) if finite[row]}
        if not self.folder or not rows:
            return
        table = torch.tensor([list(bytes.fromhex(key)) for key in rows], dtype=torch.uint8)
        tensors = {"keys": table, "features": features[list(rows.values())].contiguous()}
        content = safetensors.torch.save(tensors, {"about": json.dumps(self.about, default=str)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / f"{self.space}-{digest(content)}.safetensors", content)
        except (OSError, DatasetError) as error:
            warnings.warn(f"{self.folder}: features could not be kept ({error}); the next run encodes them again. "
                          "Free some space, or set BSAP_CACHE to another folder.", stacklevel=4)  # fmt: skip


# Encoding


def read_image(ds: ReferDataset, image_id: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return an image as uint8 [3, H, W] on `device`; on CUDA, nvJPEG decodes what it can. Raises as `ds.load_image`."""
    path = ds.image_path(image_id)
    if torch.device(device).type == "cuda" and path.suffix.lower() in (".jpg", ".jpeg"):
        with contextlib.suppress(ImportError, RuntimeError):  # what it refuses, PIL decodes, or says what is wrong
            image = decode_jpeg(path, device)
            if list(image.shape[1:]) == ds.images.loc[image_id, ["height", "width"]].tolist():
                return image
    return transforms.pil_to_tensor(ds.load_image(image_id)).to(device)


def decode_jpeg(path: Path, device: torch.device | str) -> torch.Tensor:
    """Return a JPEG as uint8 [3, H, W], decoded on `device`. Raises RuntimeError for what is no whole JPEG."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file  # announced to leave for torchcodec

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return decode_jpeg(read_file(str(path)), ImageReadMode.RGB, device)


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], threads: int = 4) -> Iterator[Result]:
    """Yield function(item) of each item in order, worked out by threads ahead of need, but never more than 4 a thread.

    >>> list(prefetch(abs, [-1, -2, 3]))
    [1, 2, 3]
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class ClipScorer:
    """An open_clip model that turns images, regions and texts into unit vectors, and those into logits.

    `model`, `pretrained`: any pair that open_clip knows; or `hf-hub:OWNER/NAME`, or `local-dir:FOLDER` (both bring their
    own weights); or a model's name and the path of a checkpoint file. `device="auto"` takes CUDA, then Apple MPS, then the
    CPU; `precision="auto"` bf16 on a GPU that has it, else fp32. `batch_size` pictures or texts are encoded at once; 0 is
    16 on a CPU, where more is no faster, else 1,024. It is halved as often as the device runs out of memory. With `cache`,
    features of regions and texts are kept on disk. Features are unit vectors, float32, on the CPU. Raises ModelError.

    >>> scorer = ClipScorer("local-dir:data/clip-refshapes", device="cpu")
    >>> scorer.encode_texts(["red star", "key"], "a photo of {}").shape
    torch.Size([2, 64])
    """

    def __init__(self, model: str = "ViT-B-32", pretrained: str = "openai", device: str = "auto", precision: str = "auto",
                 batch_size: int = 0, cache: bool = True) -> None:  # fmt: skip
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        self.model_name, self.pretrained = model, "" if ":" in model else pretrained
        net, self.tokenizer, config = _load(model, self.pretrained, self.precision, self.device)
        self.model: Any = net.eval()
        self.model.visual.to(memory_format=torch.channels_last)
        self.batch_size = batch_size or (16 if self.device.type == "cpu" else 1024)
        self.cache, self.width = cache, int(config["embed_dim"])
        self.preprocess: dict[str, Any] = self.model.visual.preprocess_cfg
        size = self.preprocess["size"]
        self.image_size: int | tuple[int, int] = size if isinstance(size, int) else tuple(size)
        self.interpolation = "bilinear" if self.preprocess["interpolation"] == "bilinear" else "bicubic"
        mean, std = (torch.tensor(self.preprocess[name], device=self.device).view(3, 1, 1) for name in ("mean", "std"))
        self._scale, self._shift = 1 / (255 * std), -mean / std  # of uint8: (pixel / 255 - mean) / std in one pass
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self._dtype = kinds.get(self.precision.removeprefix("pure_"), torch.float32)
        self.logit_scale = float(self.model.logit_scale.detach().exp())
        bias = getattr(self.model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias.detach())  # SigLIP
        self._known_texts: dict[str, torch.Tensor] = {}

    def _pixels(self, views: torch.Tensor) -> torch.Tensor:
        """Turn [N, 3, S, S] uint8 on any device into the model's input."""
        pixels = torch.addcmul(self._shift, views.to(self.device, non_blocking=True).float(), self._scale)
        return pixels.to(self._dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def _in_batches(self, encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """Encode inputs [N, …] in batches: [N, D] float32; with half the batch where the device's memory is too small."""
        while True:
            try:
                return torch.cat([encode(part).float() for part in inputs.split(self.batch_size)])
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
            self.batch_size //= 2  # outside of the handler: its traceback would keep the failed batch in memory
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _encode_views(self, views: torch.Tensor) -> torch.Tensor:
        return self._in_batches(lambda part: self.model.encode_image(self._pixels(part)), views)

    def encode_images(self, images: Iterable[Picture]) -> torch.Tensor:
        """Encode pictures (paths, bytes, PIL; upright) or uint8 tensors [3, H, W], squashed to the model's square: [N, D]."""

        def load(image: Picture) -> torch.Tensor:
            if not isinstance(image, torch.Tensor):
                image = transforms.pil_to_tensor(open_picture(image, upright=True))
            return squash(image.to(self.device), self.image_size, self.interpolation)

        features, group = [], []
        for view in prefetch(load, images):
            group.append(view)
            if len(group) == 16 * self.batch_size:
                features.append(self._encode_views(torch.stack(group)))
                group = []
        if group:
            features.append(self._encode_views(torch.stack(group)))
        if not features:
            raise ValueError("Nothing to encode: no images were given.")
        return normalize(torch.cat(features), dim=-1).cpu()

    def encode_texts(self, texts: Iterable[str], template: str = "{}") -> torch.Tensor:
        """Encode texts, in lower case, in a template with one "{}": [N, D]. Each distinct text is encoded once.

        Texts over the model's context length are truncated, as CLIP does; a warning says how many. Raises ValueError for
        no text and a template without its place.
        """
        if template.count("{}") != 1:
            raise ValueError(f"The template {template!r} needs one {{}}, where the text goes, as in {TEMPLATE!r}.")
        filled = [template.replace("{}", text.lower()) for text in texts]
        if not filled:
            raise ValueError("Nothing to encode: no texts were given.")
        new = [text for text in dict.fromkeys(filled) if text not in self._known_texts]
        if new:
            length = self.tokenizer.context_length
            store = self._store(tokenizer=type(self.tokenizer).__name__, length=length)
            features = store.find(keys := [digest(text) for text in new])
            unknown = features.isnan().any(1)
            if unknown.any():
                features[unknown] = self._encode_tokens([text for text, one in zip(new, unknown, strict=True) if one])
                if len(filled) > 1:  # one that somebody typed is not worth a file
                    store.keep([key for key, one in zip(keys, unknown, strict=True) if one], features[unknown])
            self._known_texts.update(zip(new, features, strict=True))
        return torch.stack([self._known_texts[text] for text in filled])

    def _encode_tokens(self, texts: list[str]) -> torch.Tensor:
        length = self.tokenizer.context_length
        padding = self.tokenizer([""], context_length=length + 1)[0, -1]
        truncated = int((self.tokenizer(texts, context_length=length + 1)[:, -1] != padding).sum())
        if truncated:
            warnings.warn(f"{truncated} of {len(texts)} texts are longer than the {length} tokens of {self.model_name}; "
                          "their ends are cut off.", stacklevel=3)  # fmt: skip
        tokens = self.tokenizer(texts)
        features = self._in_batches(lambda part: self.model.encode_text(part.to(self.device)), tokens)
        return normalize(features, dim=-1).cpu()

    def encode_regions(self, ds: ReferDataset, candidates: pd.DataFrame, visual_prompts: Sequence[str] = ("crop", "blur"),
                       global_weight: float = 0.95) -> torch.Tensor:  # fmt: skip
        """Encode every candidate under every visual prompt: [V, C, D].

        Each image is decoded once, ahead of need; its regions are cut, blurred and resized on the device and encoded in
        batches across images. What the cache knows is not encoded again; every group of images is kept as it is done, so
        that an interrupted run goes on. `candidates`: one row each, in any order: image_id, x, y, w, h in pixels and, for
        prompts that show masks, segmentation. "global_local" is Global-Local CLIP's (Yu et al., CVPR 2023):
        `global_weight` · g + (1 - `global_weight`) · l of features not yet normalized, g the whole image's with the patches
        outside the mask hidden, l that of mask_crop; the paper has 0.95, and 0.85 for RefCOCOg.

        Raises DatasetError for images and masks that are missing or damaged, ValueError for an unknown visual prompt and
        without a candidate, ModelError for global_local with a model that has no class token over patch tokens.
        """
        self._check_regions(ds, candidates, visual_prompts)
        masked = not MASK_PROMPTS.isdisjoint(visual_prompts)
        segmentations = _segmentations(ds, candidates, visual_prompts) if masked else None
        stores = [self._store_of(name, global_weight) for name in visual_prompts]
        keys = _region_keys(ds, candidates, segmentations) if any(store.folder for store in stores) else {}
        keys_of = [keys.get(name in MASK_PROMPTS, [""] * len(candidates)) for name in visual_prompts]
        features = torch.stack([store.find(own) for store, own in zip(stores, keys_of, strict=True)])
        missing = features.isnan().any(-1)
        boxes = torch.tensor(candidates[XYWH].to_numpy(np.float32))

        def load(job: tuple[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
            image_id, rows = job
            image = read_image(ds, image_id, self.device)
            if segmentations is None:
                return image, None
            return image, _masks(segmentations[rows.numpy()], image, image_id)

        def finish(group: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> None:
            encoded = self._encode_views(torch.cat([views for *_, views, _ in group]))
            parts = encoded.split([len(rows) for _, rows, *_ in group])
            mixed = [one if whole is None else global_weight * whole + (1 - global_weight) * one
                     for one, (*_, whole) in zip(parts, group, strict=True)]  # fmt: skip
            done = normalize(torch.cat(mixed), dim=-1).cpu()
            prompts = torch.cat([torch.full((len(rows),), prompt) for prompt, rows, *_ in group])
            rows = torch.cat([rows for _, rows, *_ in group])
            features[prompts, rows] = done
            for prompt, store in enumerate(stores):
                own = rows[prompts == prompt]
                store.keep([keys_of[prompt][row] for row in own.tolist()], features[prompt, own])

        jobs = [(image_id, torch.from_numpy(rows)) for image_id, rows
                in candidates.groupby("image_id", sort=False).indices.items() if missing[:, rows].any()]  # fmt: skip
        group: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        loaded = prefetch(load, tqdm(jobs, desc="Encoding images", delay=2, leave=False))
        for (_, rows), (image, masks) in zip(jobs, loaded, strict=True):
            for prompt, name in enumerate(visual_prompts):
                if len(own := rows[new := missing[prompt, rows]]):
                    shown = None if masks is None else masks[new.to(masks.device)]
                    views = show_regions(image, boxes[own], [name], self.image_size, shown, self.interpolation)[0]
                    whole = self._whole(image, shown) if name == "global_local" and shown is not None else None
                    group.append((prompt, own, views, whole))
            if sum(len(rows) for _, rows, *_ in group) >= max(256, 4 * self.batch_size):
                finish(group)
                group = []
        if group:
            finish(group)
        return features

    @torch.inference_mode()
    def _whole(self, image: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Return the features [N, D] of the whole image with the patches outside of each mask hidden, not normalized."""
        pixels = self._pixels(squash(image, self.image_size, self.interpolation)[None])
        keep = patch_masks(masks, self.model.visual.grid_size)
        return torch.cat(
            [encode_masked(self.model.visual, pixels, part).float() for part in keep.split(self.batch_size)]
        )

    def _check_regions(self, ds: ReferDataset, candidates: pd.DataFrame, names: Sequence[str]) -> None:
        """Raise, before hours of work, what `encode_regions` says that it raises."""
        check_prompts(names)
        if "global_local" in names and not has_patch_tokens(self.model.visual):
            raise ModelError(f"The visual prompt 'global_local' hides patch tokens, but the image tower of "
                             f"{self.model_name}, {type(self.model.visual).__name__}, has no class token over such. Use "
                             "a ViT of open_clip, e.g. ViT-B-32, or a prompt such as mask_crop.")  # fmt: skip
        if not len(candidates) or not len(names):
            raise ValueError("Nothing to encode: no candidates or no visual prompts were given.")
        if absent := ds.missing_images():
            raise DatasetError(f"{len(absent)} of {len(ds.images)} images are not in {ds.image_root}, e.g. {absent[0]}. "
                               "Get them with `bsap data get`, or pass the right `image_root`.")  # fmt: skip

    def _store(self, **about: Any) -> Store:
        return Store({**self._identity, **about} if self.cache and cache_folder() else None, self.width)

    def _store_of(self, name: str, global_weight: float) -> Store:
        """Return where a visual prompt's features are: nowhere for a function of one's own, whose code may call others."""
        if VISUAL_PROMPTS[name].__module__ != show_regions.__module__:
            return Store(None, self.width)
        code = digest([inspect.getsource(one) for one in (visual_prompts, encode_masked, open_picture, decode_masks)])
        own = {"global_weight": global_weight} if name == "global_local" else {}
        return self._store(visual_prompt=name, code=code, **own)

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What features depend on, whatever is encoded."""
        versions = [one.__version__ for one in (torch, torchvision, open_clip, Image)]
        return {"model": self.model_name, "pretrained": self.pretrained, "weights": self.weights_hash(),
                "architecture": digest(repr(self.model)), "preprocess": self.preprocess, "precision": self.precision,
                "device": self.device.type, "versions": versions}  # fmt: skip

    def weights_hash(self) -> str:
        """Return 12 hexadecimal digits that change whenever the weights do."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        return found.hexdigest()[:12]

    def logits(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Return logits [C, T] of image features [C, D], or [V, C, D] (the mean over V prompts), for texts [T, D].

        `logit_scale · cos`, plus SigLIP's logit bias. ReCLIP sums over prompts: the same ranking for CLIP, but the mean
        keeps the meaning of BSAP's temperature whatever the number of prompts.
        """
        return self.logit_scale * _mean(image) @ text.T + self.logit_bias

    def pair_logits(self, image: torch.Tensor, text: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Return the logit of every pair [P], as `logits` has it; row e of `text` [E, D] is the e-th expression."""
        mean = _mean(image)
        parts = zip(pairs.candidate.split(2**16), pairs.expression.split(2**16), strict=True)  # no [P, D] at a time
        cosines = [(mean[candidate] * text[expression]).sum(-1) for candidate, expression in parts]
        return self.logit_scale * torch.cat(cosines) + self.logit_bias


def _mean(image: torch.Tensor) -> torch.Tensor:
    return image.mean(0) if image.ndim == 3 else image


def _masks(segmentations: np.ndarray, image: torch.Tensor, image_id: int) -> torch.Tensor:
    try:
        return torch.from_numpy(decode_masks(segmentations, *image.shape[1:])).to(image.device)
    except DatasetError as error:
        raise DatasetError(f"Image {image_id}: the mask of a candidate is wrong: {error}. Correct it, or leave "
                           "this candidate out.") from error  # fmt: skip


def _segmentations(ds: ReferDataset, candidates: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Return the segmentation of each candidate: [C], None for the whole image. Raises DatasetError where one lacks."""
    given = candidates["segmentation"] if "segmentation" in candidates else [None] * len(candidates)
    there = np.array([isinstance(one, (dict, list)) and len(one) > 0 for one in given], dtype=bool)
    size = ds.images.loc[candidates["image_id"], ["width", "height"]].to_numpy()
    without = np.flatnonzero(~there & (candidates[["w", "h"]].to_numpy() < size).any(1))
    if len(without):
        needy = ", ".join(name for name in names if name in MASK_PROMPTS)
        raise DatasetError(f"{len(without)} of {len(candidates)} candidates have no segmentation (the first is of image "
                           f"{candidates['image_id'].iloc[without[0]]}), which {needy} needs. Pass candidates with masks, "
                           "such as those of ground_truth, or choose visual prompts for boxes.")  # fmt: skip
    masks = np.array([*given, None], object)[:-1]  # the None keeps NumPy from making a table of lists
    masks[~there] = None
    return masks


def _region_keys(ds: ReferDataset, candidates: pd.DataFrame, segmentations: np.ndarray | None) -> dict[bool, list[str]]:
    """Return the cache's keys of all candidates, without their masks (False) and with them (True)."""
    ids = candidates["image_id"].unique()
    pictures = dict(zip(ids, prefetch(lambda one: digest(ds.image_path(one).read_bytes()), ids), strict=True))
    boxes = candidates[XYWH].to_numpy(np.float64).tolist()
    keys = [digest(pictures[one], box) for one, box in zip(candidates["image_id"], boxes, strict=True)]
    masks = [] if segmentations is None else [digest(key, one) for key, one in zip(keys, segmentations, strict=True)]
    return {False: keys, True: masks}


# Several models


class Ensemble:
    """Several scorers with the verbs of one (ReCLIP uses two): features are lists, logits the mean over the models.

    The sum ranks alike for CLIP; the mean keeps the meaning of BSAP's temperature.
    """

    def __init__(self, scorers: Sequence[ClipScorer]) -> None:
        self.scorers = list(scorers)
        self.model_name = " + ".join(scorer.model_name for scorer in scorers)
        self.logit_scale = float(np.mean([scorer.logit_scale for scorer in scorers]))

    def encode_images(self, images: Sequence[Picture]) -> list[torch.Tensor]:
        return [scorer.encode_images(images) for scorer in self.scorers]

    def encode_texts(self, texts: Sequence[str], template: str = "{}") -> list[torch.Tensor]:
        return [scorer.encode_texts(texts, template) for scorer in self.scorers]

    def encode_regions(self, *arguments: Any, **options: Any) -> list[torch.Tensor]:
        return [scorer.encode_regions(*arguments, **options) for scorer in self.scorers]

    def logits(self, image: Sequence[torch.Tensor], text: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([one.logits(*own) for one, *own in zip(self.scorers, image, text, strict=True)]).mean(0)

    def pair_logits(self, image: Sequence[torch.Tensor], text: Sequence[torch.Tensor], pairs: Pairs) -> torch.Tensor:
        own = zip(self.scorers, image, text, strict=True)
        return torch.stack([scorer.pair_logits(i, t, pairs) for scorer, i, t in own]).mean(0)


def load_scorer(models: str | Sequence[str], pretrained: str | Sequence[str] = "openai", device: str = "auto",
                **options: Any) -> ClipScorer | Ensemble:  # fmt: skip
    """Return the scorer of a model, or of several with as many (or one) `pretrained`, averaged. Raises ModelError."""
    names, tags = ([one] if isinstance(one, str) else list(one) for one in (models, pretrained))
    tags = tags * len(names) if len(tags) == 1 else tags
    if len(tags) != len(names):
        raise ModelError(f"{len(names)} models and {len(tags)} pretrained: give one for all, or one for each.")
    scorers = [ClipScorer(name, tag, device, **options) for name, tag in zip(names, tags, strict=True)]
    return scorers[0] if len(scorers) == 1 else Ensemble(scorers)
