"""CLIP scoring: each region and each distinct text encoded once, and the logits that every correction starts from.

Features are kept on disk, so that a second run encodes nothing. A file `SPACE-DIGEST.safetensors` holds those of a group
of images (or texts) with their keys. SPACE is a digest of all that they depend on (weights, model, visual prompt and its
code, precision, versions), DIGEST one of the file's bytes; a key is a digest of the picture's bytes, the box and, where
the prompt shows it, the mask. Bytes, not names or times: a picture that is replaced or moved is not taken for another.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:  # before whatever imports it, too
    from huggingface_hub import constants as hub
    from huggingface_hub import try_to_load_from_cache
except ValueError as error:
    raise ValueError(f"HF_ENDPOINT={os.environ.get('HF_ENDPOINT')} is no address: correct or unset it.") from error

import httpx
import numpy as np
import open_clip
import pandas as pd
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

from . import ROOT, visual_prompts
from .datasets import XYWH, DatasetError, ReferDataset, open_picture, read_bytes, write_file
from .global_local import encode_masked, has_patch_tokens
from .regions import Pairs, decode_masks
from .visual_prompts import MASK_PROMPTS, VISUAL_PROMPTS, check_prompts, patch_masks, show_regions, squash

TEMPLATE = "a photo of {}"  # ReCLIP's text: "a photo of " + the expression in lower case
SAMPLE_MODEL = "local-dir:data/clip-refshapes"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "pure_bf16": torch.bfloat16, "pure_fp16": torch.float16}  # fmt: skip
NETWORK = re.compile(r"HF_ENDPOINT|(HTTPS?|ALL)_PROXY|SSL_CERT_(FILE|DIR)", re.IGNORECASE)
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
SHARD = re.compile(r"\.?[0-9a-f]{32}-[0-9a-f]{32}(\.\d+\.part)?\.safetensors")  # with a part's name of `write_file`
ARCHIVE = """it is a TorchScript archive, the form of OpenAI's own files, which holds code and is not opened. Use \
pretrained='openai'; or, where you trust it, torch.save(open_clip.load_openai_model(PATH, device='cpu').state_dict(), \
'NEW.pt') with the -quickgelu model"""
OBJECTS = """it holds other objects (of NumPy, say) beside the weights, as training checkpoints do, and a pickle is not \
run. Where you trust it, keep the weights: torch.save(torch.load(PATH, weights_only=False)['state_dict'], 'NEW.pt')"""


class ModelError(RuntimeError):
    """A model that cannot be used: unknown, without weights, or not reachable. The message says what to do."""


def pick_device(device: str = "auto") -> torch.device:
    """Return the device to compute on: "auto" takes CUDA, then Apple MPS, then the CPU. Raises ModelError."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    there = [f"{kind}:{number}" for kind, count in counts.items() for number in range(count)]
    if device != "auto" and device not in there and f"{device}:0" not in there:
        raise ModelError(f"device={device!r} is not on this machine, which has {', '.join(there)}. Use 'auto'.")
    return torch.device(there[0].removesuffix(":0") if device == "auto" else device)


def pick_precision(precision: str, device: torch.device) -> str:
    """Return open_clip's name of the precision: "auto" is bf16 on a GPU that has it, else fp32. Raises ModelError."""
    if precision not in ("auto", *DTYPES):
        raise ModelError(f"precision={precision!r} is unknown: use auto, {', '.join(DTYPES)}.")
    halves = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision if precision != "auto" else "bf16" if halves else "fp32"


def hub_problem() -> str:
    """Return why the Hugging Face hub does not answer within 3 seconds, with the variables to look at; else ""."""
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:  # once: its own client would go on trying for half a minute
        httpx.head(hub.ENDPOINT, timeout=3)
    except Exception as error:  # also for addresses and proxies that are none, and certificates that are not there
        names = [name for name, value in os.environ.items() if NETWORK.fullmatch(name) and not os.path.exists(value)]
        return f"{hub.ENDPOINT} cannot be reached ({error}{names and '; correct or unset ' or ''}{', '.join(names)})"
    return ""


def _record(model: str, pretrained: str) -> dict[str, Any]:
    """Return open_clip's record of weights, {} of a file or folder. Raises ModelError with the nearest known names."""
    schema, _, name = model.partition(":")
    if schema == "local-dir" and not (Path(name) / "open_clip_config.json").is_file():
        raise ModelError(f"{name}: no open_clip_config.json there. Give a model's folder, as {SAMPLE_MODEL}.")
    if schema in ("local-dir", "hf-hub"):
        return {"hf_hub": f"{name}/"} if schema == "hf-hub" else {}
    if model not in open_clip.list_models():
        raise ModelError(f"open_clip has no model {model!r}. Nearest: {_nearest(model, open_clip.list_models())}; "
                         "or give 'hf-hub:OWNER/NAME' or 'local-dir:FOLDER'.")  # fmt: skip
    record = open_clip.get_pretrained_cfg(model, pretrained)
    if record.get("quick_gelu") and (twin := _twin(model)) and pretrained.lower() != "openai":
        raise ModelError(f"QuickGELU mismatch: {pretrained!r} was trained with it, {model} is without. Use {twin!r}.")
    if not record and not Path(pretrained).is_file():
        tags = _nearest(pretrained, open_clip.list_pretrained_tags_by_model(model))
        raise ModelError(f"{pretrained!r} is no file, and no weights that open_clip has for {model}. Nearest: {tags}.")
    return record


def _nearest(name: str, known: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, 6, 0.3) or sorted(known)[:6])


def _twin(model: str) -> str:
    """Return the name of the same model with QuickGELU, "" where there is none or this is it."""
    return f"{model}-quickgelu" if f"{model}-quickgelu" in open_clip.list_models() else ""


def find_weights(model: str, pretrained: str = "openai", problem: str = "") -> Path:
    """Return the file here that `ClipScorer(model, pretrained)` takes its weights from, looked for where open_clip does.

    Raises ModelError, which `problem`, why nothing can be fetched, becomes a part of.
    """
    record, folder = _record(model, pretrained), model.partition(":")[2]
    repository, _, name = record.get("hf_hub", "").rpartition("/")
    source, found = record.get("url", WEIGHTS[0]), [Path(pretrained)]
    if repository:
        source = f"{name or WEIGHTS[0]} of {hub.ENDPOINT}/{repository}"
        names = (Path(name).with_suffix(".safetensors").name, name) if name else WEIGHTS
        found = [Path(str(try_to_load_from_cache(repository, one) or "")) for one in names]
    elif folder:
        found = [file for kind in ("safetensors", "bin", "pth") for file in sorted(Path(folder).glob(f"*.{kind}"))]
    elif record:
        found = [Path("~/.cache/clip", source.rpartition("/")[2]).expanduser()]
    for file in filter(Path.is_file, found):
        return file
    own = (record.get("quick_gelu") and _twin(model)) or model
    use = "model='local-dir:FOLDER' with all its files" if folder else f"model={own!r}, pretrained='PATH/TO/FILE'"
    raise ModelError(f"The weights of {model} {pretrained} are not on this machine{problem and f', and {problem}'}. On one "
                     f"with a network download {source}, and use {use}; or try the sample's {SAMPLE_MODEL!r}.")  # fmt: skip


def _refuse_plain_gelu(model: str, file: Path) -> None:
    """Raise ModelError where a checkpoint is OpenAI's and the model is without QuickGELU; warn where nobody can tell."""
    marks, weight = " ".join([file.name, *re.findall(r"models--[^/]+", str(file))]), torch.ones(1)  # of the hub's cache
    with contextlib.suppress(Exception):  # what cannot be read is explained where it is loaded
        state = open_clip.factory.load_state_dict(str(file))
        marks += " openai" * ("input_resolution" in state)
        weight = state["visual.conv1.weight"]
        marks += str(safetensors.safe_open(file, "pt").metadata()) if file.suffix == ".safetensors" else ""
    # OpenAI's were made in half precision, and still are such numbers when somebody stored them in single precision
    halves = weight.ndim == 4 and weight.dtype != torch.bfloat16 and torch.equal(weight.half().to(weight.dtype), weight)
    if halves or "openai" in marks.lower():
        raise ModelError(f"{file} holds OpenAI's weights, by its name, metadata or half-precision numbers: trained with "
                         f"QuickGELU, which {model} is without. Use {_twin(model)!r}; others' weights, in a 'local-dir:' "
                         "folder, whose open_clip_config.json says what they need.")  # fmt: skip
    warnings.warn(f"{file} does not say whether it was trained with QuickGELU, and {model} is without. Weights of OpenAI, "
                  f"MetaCLIP and DFN need {_twin(model)!r}.", stacklevel=5)  # fmt: skip


def _load(model: str, pretrained: str, precision: str, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """Return open_clip's model, tokenizer and configuration. Raises ModelError."""
    record, text = _record(model, pretrained), {}
    if not model.startswith("hf-hub:"):
        text = open_clip.get_model_config(model)["text_cfg"]
    fetched = bool(record or "hf_model_name" in text or ("hf_tokenizer_name" in text and ":" not in model))
    problem, what = hub_problem() if fetched else "", f"{model} {pretrained}".strip()
    file = find_weights(model, pretrained, problem) if problem or not record else Path()
    if not record and _twin(model):
        _refuse_plain_gelu(model, file)
    # offline, the hub's client answers from its cache at once, and says at once that something is not there
    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, bool(problem) or not fetched
    try:
        net = open_clip.create_model(model, pretrained or None, precision=precision, device=device, require_pretrained=True,
                                     force_quick_gelu=bool(record) and pretrained.lower() == "openai")  # fmt: skip
        what = f"The tokenizer {text.get('hf_tokenizer_name', '')} of {model}"
        return net, open_clip.get_tokenizer(model), open_clip.get_model_config(model)
    except Exception as error:
        why = " ".join(str(error).split())
        why = ARCHIVE if "TorchScript" in why else OBJECTS if "weights_only" in why else why[:200]
        remedy = "Put its files into a 'local-dir:' model's folder" if "tokenizer" in what else "Is the file whole?"
        raise ModelError(f"{what} could not be loaded{problem and f', and {problem}'}: {why}. {remedy}.") from error
    finally:
        hub.HF_HUB_OFFLINE = before


def cache_folder() -> Path | None:
    """Return where features are kept: `BSAP_CACHE` where it is set (empty: nowhere, None), else the clone's data/cache."""
    given = os.environ.get("BSAP_CACHE", ROOT / "data/cache")
    return Path(given).resolve() if given != "" else None


def cache_files(pattern: str = "*") -> list[Path]:
    """Return the cache's own files: those whose names we made, in the folder itself, and no links."""
    found = folder.glob(pattern) if (folder := cache_folder()) else ()
    return sorted(path for path in found if SHARD.fullmatch(path.name) and path.is_file() and not path.is_symlink())


def cache_usage() -> tuple[int, int]:
    """Return how many files the cache has and how many bytes they take."""
    sizes = [path.stat().st_size for path in cache_files()]
    return len(sizes), sum(sizes)


def clear_cache() -> tuple[int, int]:
    """Delete the cache's files, unfinished ones too: (files, bytes). Anything else in its folder stays."""
    usage = cache_usage()
    for path in cache_files():
        path.unlink(missing_ok=True)
    return usage


def digest(*parts: Any) -> str:
    """Return 32 hexadecimal digits for bytes, or for anything that JSON can write."""
    content = parts[0] if isinstance(parts[0], bytes) else json.dumps(parts, default=str).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Store:
    """Features [N, width] on disk that depend on `about`, by key; nothing is found or kept where that is None."""

    def __init__(self, about: dict[str, Any] | None, width: int) -> None:
        self.folder = cache_folder() if about else None
        self.about, self.width, self.space = json.dumps(about, default=str), width, digest(about)

    def find(self, keys: Sequence[str]) -> Tensor:
        """Return the features of N keys, NaN where they are not known."""
        features = torch.full((len(keys), self.width), torch.nan)
        for path in cache_files(f"{self.space}-*") if self.folder else ():
            stored, found = self._read(path)
            place = torch.from_numpy(pd.Index(stored).get_indexer(keys))
            features[place >= 0] = found[place[place >= 0]]
        return features

    def _read(self, path: Path) -> tuple[list[str], Tensor]:
        """Return a file's keys and features. One that is damaged is removed; one that cannot be read now is left."""
        try:
            content = path.read_bytes()
            if digest(content) != path.stem[33:]:
                raise ValueError("its bytes are not those that were written")
            tensors = safetensors.torch.load(content)
            keys = [key.numpy().tobytes().hex() for key in tensors["keys"]]
            return keys, tensors["features"].view(len(keys), self.width)
        except (ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            warnings.warn(f"{path}: this part of the cache is damaged ({error}) and encoded again.", stacklevel=4)
            with contextlib.suppress(OSError):  # of a cache that cannot be written
                path.unlink()
        except (OSError, MemoryError) as error:
            warnings.warn(f"{path}: this part of the cache cannot be read now ({error!r}).", stacklevel=4)
        return [], torch.zeros(0, self.width)

    def keep(self, keys: Sequence[str], features: Tensor) -> None:
        """Keep features under N keys. A cache that cannot be written is a warning: the run goes on without."""
        finite = features.isfinite().all(1).tolist()
        rows = {key: row for row, key in enumerate(keys) if finite[row]}
        if not self.folder or not rows:
            return
        table = torch.frombuffer(bytearray.fromhex("".join(rows)), dtype=torch.uint8).view(-1, 16)
        tensors = {"keys": table, "features": features[list(rows.values())]}
        content = safetensors.torch.save(tensors, {"about": self.about})
        try:
            write_file(self.folder / f"{self.space}-{digest(content)}.safetensors", content)
        except (OSError, DatasetError) as error:
            warnings.warn(f"{self.folder}: features could not be kept ({error}), and the next run encodes them again. Free "
                          "some space, or set BSAP_CACHE to another folder.", stacklevel=4)  # fmt: skip


def read_image(ds: ReferDataset, image_id: int, device: torch.device | str = "cpu") -> Tensor:
    """Return an image as uint8 [3, H, W] on `device`; on CUDA, nvJPEG decodes what it can. Raises as `ds.load_image`."""
    path = ds.image_path(image_id)
    if torch.device(device).type == "cuda" and path.suffix.lower() in (".jpg", ".jpeg"):
        with contextlib.suppress(ImportError, RuntimeError):  # what it refuses, PIL decodes, or says what is wrong
            from torchvision.io import ImageReadMode, decode_jpeg, read_file  # announced to leave for torchcodec

            image = decode_jpeg(read_file(str(path)), ImageReadMode.RGB, device)
            if list(image.shape[1:]) == ds.images.loc[image_id, ["height", "width"]].tolist():
                return image
    return pil_to_tensor(ds.load_image(image_id)).to(device)


def ahead(function: Callable, groups: Iterable[Sequence]) -> Iterator[list]:
    """Yield [function(item), …] of each group; threads are at work on the next one meanwhile."""
    with ThreadPoolExecutor(4) as pool:
        begun = (pool.map(function, group) for group in groups)
        for results, _ in itertools.pairwise(itertools.chain(begun, [()])):
            yield list(results)


class ClipScorer:
    """An open_clip model that turns images, regions and texts into features, and those into logits.

    `model`, `pretrained`: any pair that open_clip knows, or a model's name and the path of a checkpoint; or, with weights
    of their own, `hf-hub:OWNER/NAME` and `local-dir:FOLDER`. `device="auto"` takes CUDA, then Apple MPS, then the CPU;
    `precision="auto"` bf16 on a GPU that has it, else fp32. `batch_size` pictures or texts are encoded at once; 0 is 16 on
    a CPU, where more is no faster, else 1,024; it is halved as often as the device runs out of memory. With `cache`,
    features are kept on disk. They are unit vectors, float32, on the CPU. Raises ModelError.

    >>> scorer = ClipScorer("local-dir:data/clip-refshapes", device="cpu")
    >>> scorer.encode_texts(["red star", "key"], "a photo of {}").shape
    torch.Size([2, 64])
    """

    def __init__(self, model: str = "ViT-B-32", pretrained: str = "openai", device: str = "auto", precision: str = "auto",
                 batch_size: int = 0, cache: bool = True) -> None:  # fmt: skip
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        self.model_name, self.pretrained = model, "" if ":" in model else pretrained
        loaded, self.tokenizer, config = _load(model, self.pretrained, self.precision, self.device)
        self.model: Any = loaded.eval()
        self.model.visual.to(memory_format=torch.channels_last)
        self.batch_size = batch_size or (16 if self.device.type == "cpu" else 1024)
        self.cache, self.width = cache, config["embed_dim"]
        self.preprocess: dict[str, Any] = self.model.visual.preprocess_cfg
        size = self.preprocess["size"]
        self.image_size: int | tuple[int, int] = size if isinstance(size, int) else tuple(size)
        self.interpolation = "bilinear" if self.preprocess["interpolation"] == "bilinear" else "bicubic"
        mean, std = (torch.tensor(self.preprocess[name], device=self.device).view(3, 1, 1) for name in ("mean", "std"))
        self._scale, self._shift = 1 / (255 * std), -mean / std  # of uint8: (pixel / 255 - mean) / std in one pass
        self.logit_scale = float(self.model.logit_scale.detach().exp())
        bias = getattr(self.model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias.detach())  # SigLIP
        self._texts: dict[str, Tensor] = {}  # features of the texts encoded so far

    def _pixels(self, views: Tensor) -> Tensor:
        """Turn [N, 3, S, S] uint8 on any device into the model's input."""
        pixels = torch.addcmul(self._shift, views.to(self.device, non_blocking=True).float(), self._scale)
        return pixels.to(DTYPES[self.precision], memory_format=torch.channels_last)

    @torch.inference_mode()
    def _in_batches(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
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

    def _encode_views(self, views: Sequence[Tensor]) -> Tensor:
        return self._in_batches(lambda part: self.model.encode_image(self._pixels(part)), torch.cat(list(views)))

    def encode_images(self, images: Iterable[Any]) -> Tensor:
        """Encode pictures (paths, bytes or PIL, turned upright) or uint8 tensors [3, H, W], squashed: [N, D]."""

        def load(image: Any) -> Tensor:
            pixels = image if isinstance(image, Tensor) else pil_to_tensor(open_picture(image, upright=True))
            return squash(pixels.to(self.device), self.image_size, self.interpolation)[None]

        images = iter(images)
        groups = iter(lambda: list(itertools.islice(images, 16 * self.batch_size)), [])
        features = [normalize(self._encode_views(views), dim=-1).cpu() for views in ahead(load, groups)]
        if not features:
            raise ValueError("Nothing to encode: no images were given.")
        return torch.cat(features)

    def encode_texts(self, texts: Iterable[str], template: str = "{}") -> Tensor:
        """Encode texts, in lower case, in a template with one {}: [N, D]. Each distinct text is encoded once.

        Texts over the model's context length are truncated, as CLIP does; a warning says how many. Raises ValueError
        for no text, and for a template without a place.
        """
        filled = [template.replace("{}", text.lower()) for text in texts]
        if not filled or template.count("{}") != 1:
            raise ValueError(f"{len(filled)} texts do not go into the template {template!r}: give texts, and one {{}}.")
        if new := [text for text in dict.fromkeys(filled) if text not in self._texts]:
            store = self._store(tokenizer=type(self.tokenizer).__name__, length=self.tokenizer.context_length)
            features = store.find(keys := [digest(text) for text in new])
            if len(unknown := features.isnan().any(1).nonzero().squeeze(1)):
                features[unknown] = self._encode_tokens([new[i] for i in unknown])
                if len(filled) > 1:  # one that somebody typed is not worth a file
                    store.keep([keys[i] for i in unknown], features[unknown])
            self._texts.update(zip(new, features, strict=True))
        return torch.stack([self._texts[text] for text in filled])

    def _encode_tokens(self, texts: list[str]) -> Tensor:
        length = self.tokenizer.context_length
        padding = self.tokenizer([""], context_length=length + 1)[0, -1]
        if truncated := int((self.tokenizer(texts, context_length=length + 1)[:, -1] != padding).sum()):
            warnings.warn(f"{truncated} of {len(texts)} texts are longer than the {length} tokens of {self.model_name}; "
                          "their ends are cut off.", stacklevel=3)  # fmt: skip
        features = self._in_batches(lambda part: self.model.encode_text(part.to(self.device)), self.tokenizer(texts))
        return normalize(features, dim=-1).cpu()

    def encode_regions(self, ds: ReferDataset, candidates: pd.DataFrame, visual_prompts: Sequence[str] = ("crop", "blur"),
                       global_weight: float = 0.95) -> Tensor:  # fmt: skip
        """Encode every candidate under every visual prompt: [V, C, D].

        Each image is decoded once, ahead of need; its regions are cut, blurred and resized on the device and encoded in
        batches across images. What the cache knows is not encoded again; a group of images is kept as soon as it is done.
        `candidates`: a row each, in any order: image_id, x, y, w, h in pixels and, for prompts that show masks,
        segmentation. "global_local" is Global-Local CLIP's (Yu et al., CVPR 2023): `global_weight` · g + (1 -
        `global_weight`) · l, not yet normalized, g the whole image's with the patches outside the mask hidden, l that of
        mask_crop; the paper has 0.95, and 0.85 for RefCOCOg. Raises DatasetError for images and masks that are missing or
        damaged, ValueError for an unknown prompt and no candidate, ModelError for global_local without patch tokens.
        """
        self._check(ds, candidates, visual_prompts)
        masked = not MASK_PROMPTS.isdisjoint(visual_prompts)
        stores = [self._store(name, weight=global_weight * (name == "global_local")) for name in visual_prompts]
        kept = any(store.folder for store in stores)
        keys = _region_keys(ds, candidates, masked) if kept else [[""] * len(candidates)] * 2
        keys_of = [keys[name in MASK_PROMPTS] for name in visual_prompts]
        features = torch.stack([store.find(own) for store, own in zip(stores, keys_of, strict=True)])
        missing, boxes = features.isnan().any(-1), torch.tensor(candidates[XYWH].to_numpy(np.float32))
        groups = _groups(candidates, missing, max(256, 4 * self.batch_size))

        def load(job: tuple[int, Tensor]) -> tuple[Tensor, Tensor | None]:
            image = read_image(ds, job[0], self.device)
            masks = decode_masks(candidates["segmentation"].iloc[job[1].numpy()], *image.shape[1:]) if masked else None
            return image, None if masks is None else torch.from_numpy(masks).to(self.device)

        progress = tqdm(ahead(load, groups), "Encoding", len(groups), delay=2, leave=False)
        for group, loaded in zip(groups, progress, strict=True):
            for prompt, (name, store) in enumerate(zip(visual_prompts, stores, strict=True)):
                lacks = [missing[prompt, rows] for _, rows in group]
                done = torch.cat([rows[new] for (_, rows), new in zip(group, lacks, strict=True)])
                seen = [(image, boxes[rows[new]], masks if masks is None or new.all() else masks[new])
                        for (_, rows), new, (image, masks) in zip(group, lacks, loaded, strict=True) if new.any()]  # fmt: skip
                if seen:
                    features[prompt, done] = self._encode_seen(name, seen, global_weight)
                    store.keep([keys_of[prompt][row] for row in done], features[prompt, done])
        return features

    def _encode_seen(self, name: str, seen: list[tuple[Tensor, Tensor, Tensor | None]], global_weight: float) -> Tensor:
        """Encode what a visual prompt shows of images, boxes and masks: [n, D]."""
        size, kind = self.image_size, self.interpolation
        features = self._encode_views(
            [show_regions(image, boxes, [name], size, masks, kind)[0] for image, boxes, masks in seen]
        )
        if name == "global_local":
            whole = torch.cat([self._whole(image, masks) for image, _, masks in seen if masks is not None])
            features = global_weight * whole + (1 - global_weight) * features
        return normalize(features, dim=-1).cpu()

    @torch.inference_mode()
    def _whole(self, image: Tensor, masks: Tensor) -> Tensor:
        """Return the whole image's features with the patches outside of each mask hidden, not normalized: [N, D]."""
        pixels = self._pixels(squash(image, self.image_size, self.interpolation)[None])
        keep = patch_masks(masks, self.model.visual.grid_size).split(self.batch_size)
        return torch.cat([encode_masked(self.model.visual, pixels, part).float() for part in keep])

    def _check(self, ds: ReferDataset, candidates: pd.DataFrame, names: Sequence[str]) -> None:
        """Raise, before hours of work, what `encode_regions` says that it raises."""
        check_prompts(names)
        tower = self.model.visual
        if "global_local" in names and not has_patch_tokens(tower):
            raise ModelError(f"'global_local' hides patch tokens, and the image tower of {self.model_name}, "
                             f"{type(tower).__name__}, has no class token over such. Use a ViT, or mask_crop.")  # fmt: skip
        if not len(candidates) or not len(names):
            raise ValueError("Nothing to encode: no candidates or no visual prompts were given.")
        needy = ", ".join(name for name in names if name in MASK_PROMPTS)
        if needy and ("segmentation" not in candidates or candidates["segmentation"].isna().any()):
            raise DatasetError(f"Candidates without a segmentation, which {needy} needs. Pass some with masks, such as those "
                               "of ground_truth, or choose visual prompts for boxes.")  # fmt: skip
        if absent := ds.missing_images():
            raise DatasetError(f"{len(absent)} of {len(ds.images)} images are not in {ds.image_root}, e.g. {absent[0]}. "
                               "Get them with `bsap data get`, or pass the right `image_root`.")  # fmt: skip

    def _store(self, prompt: str = "", **about: Any) -> Store:
        """Return where features are kept: nowhere those of a prompt of one's own, whose code may call others."""
        if not (self.cache and cache_folder()) or (
            prompt and VISUAL_PROMPTS[prompt].__module__ != show_regions.__module__
        ):
            return Store(None, self.width)
        code = [inspect.getsource(one) for one in (visual_prompts, encode_masked, open_picture, decode_masks) if prompt]
        return Store({**self._identity, "prompt": prompt, "code": digest(code), **about}, self.width)

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

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Return logits [C, T] of image features [C, D], or [V, C, D] (the mean over V prompts), for texts [T, D].

        `logit_scale · cos`, plus SigLIP's logit bias. ReCLIP sums over prompts: the same ranking for CLIP, but the mean
        keeps the meaning of BSAP's temperature whatever the number of prompts.
        """
        return self.logit_scale * (image.mean(0) if image.ndim == 3 else image) @ text.T + self.logit_bias

    def pair_logits(self, image: Tensor, text: Tensor, pairs: Pairs) -> Tensor:
        """Return the logit of every pair [P], as `logits` has it; row e of `text` [E, D] is the e-th expression."""
        mean = image.mean(0) if image.ndim == 3 else image
        parts = zip(pairs.candidate.split(2**16), pairs.expression.split(2**16), strict=True)  # no [P, D] at a time
        cosines = torch.cat([(mean[candidate] * text[expression]).sum(-1) for candidate, expression in parts])
        return self.logit_scale * cosines + self.logit_bias


def _groups(candidates: pd.DataFrame, missing: Tensor, size: int) -> list[list[tuple[int, Tensor]]]:
    """Return the images with views that are missing [V, C], and their rows, in groups of some `size` such views."""
    views = missing.sum(0).numpy()
    images = candidates.groupby("image_id", sort=False).indices.items()
    jobs = [(image_id, torch.from_numpy(rows[views[rows] > 0])) for image_id, rows in images if views[rows].any()]
    number = np.cumsum([views[rows].sum() for _, rows in jobs]) // size
    return [[jobs[i] for i in np.flatnonzero(number == one)] for one in np.unique(number)]


def _region_keys(ds: ReferDataset, candidates: pd.DataFrame, masked: bool) -> list[list[str]]:
    """Return the cache's keys of all candidates, without their masks and with them."""
    ids = candidates["image_id"].unique()
    pictures = dict(zip(ids, *ahead(lambda one: digest(read_bytes(ds.image_path(one))), [ids]), strict=True))
    boxes = zip(candidates["image_id"], candidates[XYWH].to_numpy(np.float64).tolist(), strict=True)
    keys = [digest(pictures[image_id], box) for image_id, box in boxes]
    return [keys, [digest(*one) for one in zip(keys, candidates["segmentation"], strict=True)] if masked else keys]


class Ensemble(ClipScorer):
    """Several models with the verbs of one (ReCLIP uses two): the logit is the mean of theirs.

    Features are theirs side by side, each times the root of its share of the logit scales: unit vectors again. ReCLIP
    sums the logits: the same ranking for CLIP; the mean keeps the meaning of BSAP's temperature.
    """

    def __init__(self, scorers: Sequence[ClipScorer]) -> None:
        self.scorers, self.model_name = scorers, " + ".join(scorer.model_name for scorer in scorers)
        self.pretrained = " + ".join(scorer.pretrained for scorer in scorers)
        scales = np.array([scorer.logit_scale for scorer in scorers])
        self.logit_scale, self._shares = float(scales.mean()), np.sqrt(scales / scales.sum()).tolist()
        self.logit_bias = float(np.mean([scorer.logit_bias for scorer in scorers]))

    def _joined(self, verb: str, *arguments: Any, **options: Any) -> Tensor:
        theirs = [getattr(scorer, verb)(*arguments, **options) for scorer in self.scorers]
        return torch.cat([share * features for share, features in zip(self._shares, theirs, strict=True)], dim=-1)

    encode_images = functools.partialmethod(_joined, "encode_images")  # type: ignore[assignment]
    encode_texts = functools.partialmethod(_joined, "encode_texts")  # type: ignore[assignment]
    encode_regions = functools.partialmethod(_joined, "encode_regions")  # type: ignore[assignment]


def load_scorer(models: str | Sequence[str], pretrained: str | Sequence[str] = "openai", device: str = "auto",
                **options: Any) -> ClipScorer:  # fmt: skip
    """Return the scorer of a model, or of several with as many (or one) `pretrained`, averaged. Raises ModelError."""
    names, tags = ([one] if isinstance(one, str) else list(one) for one in (models, pretrained))
    tags = tags * len(names) if len(tags) == 1 else tags
    if len(tags) != len(names):
        raise ModelError(f"{len(names)} models and {len(tags)} pretrained: give one for all, or one for each.")
    scorers = [ClipScorer(name, tag, device, **options) for name, tag in zip(names, tags, strict=True)]
    return scorers[0] if len(scorers) == 1 else Ensemble(scorers)
