"""CLIP scoring: each region and each distinct text encoded once, and the logits that every correction starts from.

Features are kept on disk: a file `SPACE-DIGEST.safetensors` holds those of a group of images (or texts) with their keys.
SPACE is a digest of all that they depend on (weights, model, visual prompt and its code, precision, versions), DIGEST one
of the file's bytes; a key is a digest of the picture's bytes, whatever its name or time, of the box and the mask.
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
from unittest import mock

try:  # before whatever imports it, too
    from huggingface_hub import constants as hub
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
SAMPLE_MODEL = "local-dir:data/clip-refshapes-web"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NETWORK = re.compile(r"HF_ENDPOINT|(HTTPS?|ALL)_PROXY|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE", re.IGNORECASE)
SHARD = re.compile(r"\.?[0-9a-f]{32}-[0-9a-f]{32}(\.\d+\.part)?\.safetensors")  # with a part's name of `write_file`
MORE_THAN_WEIGHTS = """it holds code (a TorchScript archive, as OpenAI's own files) or objects (of NumPy, say), which are \
not run; where you trust it: torch.save(open_clip.factory.load_state_dict(PATH, weights_only=False), 'NEW.pt')"""


class ModelError(RuntimeError):
    """A model that cannot be used: unknown, without weights, or not reachable. The message says what to do."""


def pick_device(device: str = "auto") -> torch.device:
    """Return the device to compute on: "auto" takes CUDA, then Apple MPS, then the CPU. Raises ModelError."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=best if device == "auto" else device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device={device!r} is not here ({str(error):.80}…): use auto, or {best}.") from error


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


def find_weights(model: str, pretrained: str = "openai", problem: str = "") -> Path:
    """Return the file here that `ClipScorer(model, pretrained)` takes; ModelError, with `problem`, where none is."""
    schema, _, name = model.rpartition(":")
    record = {"hf_hub": f"{name}/"} if schema == "hf-hub" else open_clip.get_pretrained_cfg(model, pretrained)
    found = Path(name, "open_clip_model.safetensors") if schema == "local-dir" else Path(pretrained)
    with contextlib.suppress(FileNotFoundError), mock.patch.object(hub, "HF_HUB_OFFLINE", True):  # only from its cache
        found = Path(open_clip.download_pretrained(record)) if record else found
        if found.is_file():
            return found
    nearest = difflib.get_close_matches(f"{model} {pretrained}", map(" ".join, open_clip.list_pretrained()), 6, 0)
    advice = f"give one of open_clip's ({', '.join(nearest)}), a checkpoint's path, or a folder with open_clip_model.safetensors"
    if record:
        copy = f"copy what that makes in the hub's cache to {hub.HF_HUB_CACHE}"
        advice = f"where there is a network type `hf download {record['hf_hub'].rpartition('/')[0]}`, and {copy}"
    why = f"The weights of {model} {pretrained} are not on this machine{problem and ', and '}{problem}"
    raise ModelError(f"{why}; {advice}, or try the sample's {SAMPLE_MODEL!r}.")


def _check_activation(model: str, file: Path) -> None:
    """Refuse OpenAI's weights for a model without QuickGELU, with which they were trained; warn where none can tell."""
    weight, twin = torch.tensor(0.1), f"{model}-quickgelu"
    marked: Any = re.search(r"openai[^/]*(/snapshots/.*)?$", str(file), re.IGNORECASE)
    if twin not in open_clip.list_models():
        return
    with contextlib.suppress(Exception):  # what cannot be read is explained where it is loaded
        state = open_clip.factory.load_state_dict(str(file))
        weight, marked = state["visual.conv1.weight"], marked or "input_resolution" in state
    text = f"{file}: weights of OpenAI, MetaCLIP and DFN need {twin!r}; give others in a 'local-dir:' folder."
    # OpenAI's were made in half precision, and still are such numbers when somebody stored them in single precision
    if marked or weight.dtype != torch.bfloat16 and torch.equal(weight.half().to(weight.dtype), weight):
        raise ModelError(text)
    warnings.warn(text, stacklevel=4)


def _load(model: str, pretrained: str, precision: str, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """Return open_clip's model, tokenizer and configuration. Raises ModelError."""
    record, schema = open_clip.get_pretrained_cfg(model, pretrained), model.rpartition(":")[0]
    if not (record or schema):
        _check_activation(model, find_weights(model, pretrained))
    asks = bool(record) or schema == "hf-hub"  # the hub
    with contextlib.suppress(Exception):  # what cannot be read is explained where it is loaded
        asks = asks or "'hf_" in str(open_clip.get_model_config(model))
    if problem := hub_problem() if asks else "":
        find_weights(model, pretrained, problem)
    options = {"precision": precision, "device": device, "force_quick_gelu": bool(record.get("quick_gelu"))}
    try:  # offline, the hub's client answers from its cache at once, and says at once that something is not there
        with mock.patch.object(hub, "HF_HUB_OFFLINE", hub.HF_HUB_OFFLINE or bool(problem) or not asks):
            net = open_clip.create_model(model, pretrained, require_pretrained=True, **options)
            return net, open_clip.get_tokenizer(model), open_clip.get_model_config(model)
    except Exception as error:
        why = MORE_THAN_WEIGHTS if "weights_only" in str(error) else " ".join(str(error).split())[:200]
        what = f"{model} {pretrained} or its tokenizer could not be loaded{problem and ', and '}{problem}"
        raise ModelError(f"{what}: {why}. Are all its files there, and whole?") from error


def cache_folder() -> Path | None:
    """Return where features are kept: `BSAP_CACHE` where it is set (empty: nowhere, None), else the clone's data/cache."""
    given = os.environ.get("BSAP_CACHE", ROOT / "data/cache")
    return Path(given).resolve() if given != "" else None


def cache_files(pattern: str = "*") -> list[Path]:
    """Return the cache's own files: those whose names we made, in the folder itself, and no links."""
    found = folder.glob(pattern) if (folder := cache_folder()) else ()
    return sorted(path for path in found if SHARD.fullmatch(path.name) and path.is_file() and not path.is_symlink())


def cache_usage() -> tuple[int, int]:
    """Return how many files the cache has, unfinished ones too, and how many bytes they take."""
    sizes = [path.stat().st_size for path in cache_files()]
    return len(sizes), sum(sizes)


def clear_cache() -> tuple[int, int]:
    """Delete the cache's files, and nothing else in its folder: (files, bytes)."""
    usage = cache_usage()
    for path in cache_files():
        path.unlink(missing_ok=True)
    return usage


def digest(*parts: Any) -> str:
    """Return 32 hexadecimal digits for bytes, or for anything that JSON can write."""
    content = parts[0] if isinstance(parts[0], bytes) else json.dumps(parts, default=str).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def find_features(space: str, keys: Sequence[str], width: int) -> Tensor:
    """Return the features [N, width] kept under N keys, NaN where none are. A damaged file goes, an unreadable one stays."""
    features = torch.full((len(keys), width), torch.nan)
    for path in cache_files(f"{space}-*") if space else ():
        try:
            content = path.read_bytes()
            if digest(content) != path.stem[33:]:
                warnings.warn(f"{path}: this part of the cache is damaged and encoded again.", stacklevel=3)
                path.unlink()
                continue
        except (OSError, MemoryError) as error:
            warnings.warn(f"{path}: this part of the cache cannot be read now, or removed ({error!r}).", stacklevel=3)
            continue
        stored = safetensors.torch.load(content)
        place = torch.from_numpy(pd.Index([bytes(key).hex() for key in stored["keys"].numpy()]).get_indexer(keys))
        features[place >= 0] = stored["features"][place[place >= 0]]
    return features


def keep_features(space: str, keys: Sequence[str], features: Tensor) -> None:
    """Keep features under N keys. A cache that cannot be written is a warning: the run goes on without."""
    rows = {key: row for row, key in enumerate(keys) if features[row].isfinite().all()}
    folder = cache_folder()
    if not (space and folder and rows):
        return
    table = torch.frombuffer(bytearray.fromhex("".join(rows)), dtype=torch.uint8).view(-1, 16)
    content = safetensors.torch.save({"keys": table, "features": features[list(rows.values())]})
    try:
        write_file(folder / f"{space}-{digest(content)}.safetensors", content)
    except (OSError, DatasetError) as error:
        advice = "Free some space, or set BSAP_CACHE to another folder."
        warnings.warn(f"{folder}: features could not be kept ({error}). {advice}", stacklevel=3)


def read_image(ds: ReferDataset, image_id: int, device: torch.device | str = "cpu") -> Tensor:
    """Return an image as uint8 [3, H, W] on `device`; on CUDA, nvJPEG decodes what it can. Raises as `ds.load_image`."""
    path = ds.image_path(image_id)
    if torch.device(device).type == "cuda" and path.suffix.lower() in (".jpg", ".jpeg"):
        with contextlib.suppress(AttributeError, RuntimeError):  # what it refuses, PIL decodes, or says what is wrong
            image = torchvision.io.read_file(str(path))
            image = torchvision.io.decode_jpeg(image, torchvision.io.ImageReadMode.RGB, device)
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
    `precision="auto"` bf16 on a GPU that has it, else fp32. `batch_size` pictures or texts are encoded at once (0: 16 on
    a CPU, else 1,024), half as many as often as the device runs out of memory. With `cache`, features are kept on disk.
    They are unit vectors, float32, on the CPU. Raises ModelError.
    """

    def __init__(
        self,
        model: str = "ViT-B-32",
        pretrained: str = "openai",
        device: str = "auto",
        precision: str = "auto",
        batch_size: int = 0,
        cache: bool = True,
    ) -> None:
        self.device = pick_device(device)
        bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = precision if precision != "auto" else "bf16" if bf16 else "fp32"
        if self.precision not in DTYPES:
            raise ModelError(f"precision={precision!r} is unknown: use auto, {', '.join(DTYPES)}.")
        self.model_name, self.pretrained = model, "" if ":" in model else pretrained
        self.model, self.tokenizer, config = _load(model, self.pretrained, self.precision, self.device)
        self.model.eval().requires_grad_(False).visual.to(memory_format=torch.channels_last)
        self.batch_size = batch_size or (16 if self.device.type == "cpu" else 1024)
        self.cache, self.width = cache, config["embed_dim"]
        self.preprocess: dict[str, Any] = self.model.visual.preprocess_cfg
        size = self.preprocess["size"]
        self.image_size: int | tuple[int, int] = size if isinstance(size, int) else tuple(size)
        self.interpolation = "bilinear" if self.preprocess["interpolation"] == "bilinear" else "bicubic"
        mean, std = (torch.tensor(self.preprocess[name], device=self.device).view(3, 1, 1) for name in ("mean", "std"))
        self._scale, self._shift = 1 / (255 * std), -mean / std  # of uint8: (pixel / 255 - mean) / std in one pass
        self.logit_scale = float(self.model.logit_scale.exp())
        self.logit_bias = float(getattr(self.model, "logit_bias", None) or 0.0)  # SigLIP's
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
        parts = [normalize(self._encode_views(views), dim=-1).cpu() for views in ahead(load, groups)]
        return torch.cat([torch.empty(0, self.width), *parts])

    def encode_texts(self, texts: Iterable[str], template: str = "{}") -> Tensor:
        """Encode texts, in lower case, in a template with one {}, each distinct one once: [N, D]. Long ones are cut, and said."""
        filled = [template.replace("{}", text.lower()) for text in texts]
        if not filled or template.count("{}") != 1:
            raise ValueError(f"{len(filled)} texts do not go into the template {template!r}: give texts, and one {{}}.")
        if new := [text for text in dict.fromkeys(filled) if text not in self._texts]:
            space = self._space("", type(self.tokenizer).__name__, self.tokenizer.context_length)
            features = find_features(space, keys := [digest(text) for text in new], self.width)
            if len(unknown := features.isnan().any(1).nonzero().squeeze(1)):
                features[unknown] = self._encode_tokens([new[i] for i in unknown])
                if len(filled) > 1:  # one that somebody typed is not worth a file
                    keep_features(space, [keys[i] for i in unknown], features[unknown])
            self._texts.update(zip(new, features, strict=True))
        return torch.stack([self._texts[text] for text in filled])

    def _encode_tokens(self, texts: list[str]) -> Tensor:
        length = self.tokenizer.context_length
        padding = self.tokenizer([""], context_length=length + 1)[0, -1]
        if truncated := int((self.tokenizer(texts, context_length=length + 1)[:, -1] != padding).sum()):
            what = f"{truncated} of {len(texts)} texts are longer than the {length} tokens of {self.model_name}"
            warnings.warn(f"{what}: cut off.", stacklevel=3)
        features = self._in_batches(lambda part: self.model.encode_text(part.to(self.device)), self.tokenizer(texts))
        return normalize(features, dim=-1).cpu()

    def encode_regions(
        self,
        ds: ReferDataset,
        candidates: pd.DataFrame,
        visual_prompts: Sequence[str] = ("crop", "blur"),
        global_weight: float = 0.95,
    ) -> Tensor:
        """Encode every candidate under every visual prompt: [V, C, D]; what the cache knows is not encoded again.

        `candidates`: a row each, in any order: image_id, x, y, w, h in pixels and, for prompts that show masks,
        segmentation. "global_local" is Global-Local CLIP's (Yu et al., CVPR 2023): `global_weight` · g + (1 -
        `global_weight`) · l, not yet normalized, g the whole image's with the patches outside the mask hidden, l that of
        mask_crop; the paper has 0.95, and 0.85 for RefCOCOg. Raises DatasetError, ValueError and ModelError.
        """
        self._check(ds, candidates, visual_prompts)
        masked = not MASK_PROMPTS.isdisjoint(visual_prompts)
        spaces = [self._space(name, global_weight * (name == "global_local")) for name in visual_prompts]
        keys = _region_keys(ds, candidates) if any(spaces) else [""] * len(candidates)
        features = torch.stack([find_features(space, keys, self.width) for space in spaces])
        missing, boxes = features.isnan().any(-1), torch.tensor(candidates[XYWH].to_numpy(np.float32))
        groups = _groups(candidates, missing, max(256, 4 * self.batch_size))

        def load(job: tuple[int, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
            image, rows = read_image(ds, job[0], self.device), job[1]
            if not masked:
                return image, None, rows
            masks = decode_masks(candidates["segmentation"].iloc[rows.numpy()], *image.shape[1:])
            return image, torch.from_numpy(masks).to(self.device), rows

        for loaded in tqdm(ahead(load, groups), "Encoding", len(groups), delay=2, leave=False):
            for name, space, lacks, found in zip(visual_prompts, spaces, missing, features, strict=True):
                new = torch.cat([rows[lacks[rows]] for _, _, rows in loaded])
                if len(new):
                    found[new] = self._encode_new(name, loaded, lacks, boxes, global_weight)
                    keep_features(space, [keys[row] for row in new], found[new])
        return features

    def _encode_new(self, name: str, loaded: list, lacks: Tensor, boxes: Tensor, global_weight: float) -> Tensor:
        """Encode what a visual prompt shows of the rows that lack it, of images, masks and rows: [n, D]."""
        views: list[Tensor] = []
        whole: list[Tensor] = []
        for image, masks, rows in loaded:
            if (new := lacks[rows]).any():
                own: Any = masks if masks is None else masks[new]
                views += show_regions(image, boxes[rows[new]], [name], self.image_size, own, self.interpolation)
                whole += [self._whole(image, own)] if name == "global_local" else []
        features = self._encode_views(views)
        features = global_weight * torch.cat(whole) + (1 - global_weight) * features if whole else features
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
        if "global_local" in names and not has_patch_tokens(self.model.visual):
            what = f"the image tower of {self.model_name}, {type(self.model.visual).__name__},"
            raise ModelError(f"'global_local' hides patch tokens, and {what} has no class token over such: mask_crop?")
        needy = ", ".join(name for name in names if name in MASK_PROMPTS)
        if needy and ("segmentation" not in candidates or candidates["segmentation"].isna().any()):
            raise DatasetError(f"Candidates without a segmentation, which {needy} needs: take others, as ground_truth.")
        if absent := ds.missing_images():
            what = f"{len(absent)} of {len(ds.images)} images are not in {ds.image_root}, e.g. {absent[0]}"
            raise DatasetError(f"{what}: get them with `bsap data get`, or pass the right `image_root`.")

    def _space(self, prompt: str, *about: Any) -> str:
        """Return the space of features; "" if none are kept, as of a prompt of one's own, whose code may call others."""
        own = prompt and VISUAL_PROMPTS[prompt].__module__ != show_regions.__module__
        if own or not (self.cache and cache_folder()):
            return ""
        code = [inspect.getsource(one) for one in (visual_prompts, encode_masked, open_picture, decode_masks) if prompt]
        return digest(self._identity, prompt, code, about)

    @functools.cached_property
    def _identity(self) -> str:
        """What features depend on, whatever is encoded."""
        versions = [one.__version__ for one in (torch, torchvision, open_clip, Image)]
        how = [self.model_name, self.pretrained, repr(self.model), self.preprocess, self.precision, self.device.type]
        return digest(self.weights_hash(), how, versions)

    def weights_hash(self) -> str:
        """Return 12 hexadecimal digits that change whenever the weights do."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        return found.hexdigest()[:12]

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Return `logit_scale · cos`, plus SigLIP's bias, [C, T]: of image features [C, D], or the mean over V of [V, C, D]."""
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


def _region_keys(ds: ReferDataset, candidates: pd.DataFrame) -> list[str]:
    """Return the cache's keys of candidates: of their pictures' bytes, boxes and, where they have some, masks."""
    ids, boxes = candidates["image_id"].unique(), candidates[XYWH].to_numpy(np.float64).tolist()
    pictures = dict(zip(ids, *ahead(lambda one: digest(read_bytes(ds.image_path(one))), [ids]), strict=True))
    masks = candidates.get("segmentation", [None] * len(candidates))
    rows = zip(candidates["image_id"], boxes, masks, strict=True)
    return [digest(pictures[image_id], box, mask) for image_id, box, mask in rows]


class Ensemble(ClipScorer):
    """Several models as one (ReCLIP uses two): logits are the mean of theirs, features, of unit length, lie side by side."""

    def __init__(self, scorers: Sequence[ClipScorer]) -> None:
        self.scorers, scales = scorers, np.array([one.logit_scale for one in scorers])
        self.model_name = " + ".join(one.model_name for one in scorers)
        self.pretrained = " + ".join(one.pretrained for one in scorers)
        self.logit_scale, self.logit_bias = float(scales.mean()), float(np.mean([one.logit_bias for one in scorers]))
        self._shares = np.sqrt(scales / scales.sum()).tolist()

    def _joined(self, verb: str, *arguments: Any, **options: Any) -> Tensor:
        theirs = [getattr(scorer, verb)(*arguments, **options) for scorer in self.scorers]
        return torch.cat([share * features for share, features in zip(self._shares, theirs, strict=True)], dim=-1)

    encode_images = functools.partialmethod(_joined, "encode_images")  # type: ignore[assignment]
    encode_texts = functools.partialmethod(_joined, "encode_texts")  # type: ignore[assignment]
    encode_regions = functools.partialmethod(_joined, "encode_regions")  # type: ignore[assignment]


def load_scorer(
    models: str | Sequence[str], pretrained: str | Sequence[str] = "openai", device: str = "auto", **options: Any
) -> ClipScorer:
    """Return the scorer of a model, or of several with as many (or one) `pretrained`, averaged. Raises ModelError."""
    pairs = np.broadcast(np.atleast_1d(models), np.atleast_1d(pretrained))
    scorers = [ClipScorer(str(name), str(tag), device, **options) for name, tag in pairs]
    return scorers[0] if len(scorers) == 1 else Ensemble(scorers)
