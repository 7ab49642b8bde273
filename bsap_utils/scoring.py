"""CLIP scoring: each region and each distinct text encoded once, and the logits that every correction starts from.

Features are kept on disk: a file `SPACE-DIGEST.safetensors` holds those of a group of images (or texts) with their keys.
SPACE is a digest of all that they depend on (weights, model, visual prompt and its code, precision, versions), DIGEST one
of the file's bytes; a key is a digest of the picture's bytes, whatever its name or time, of the box and the mask.
"""

import contextlib
import functools
import hashlib
import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from huggingface_hub import constants, get_session, try_to_load_from_cache
except ValueError as error:
    raise ValueError(f"HF_ENDPOINT={os.environ['HF_ENDPOINT']} is no address: correct or unset it.") from error

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
from .visual_prompts import MASK_PROMPTS, VISUAL_PROMPTS, patch_masks, show_regions, squash

TEMPLATE = "a photo of {}"  # ReCLIP's text: "a photo of " + the expression in lower case
SAMPLE_MODEL = "local-dir:data/clip-refshapes-web"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEX = "[0-9a-f]" * 32  # a digest in a file's name
# nvJPEG writes at once, also where waiting kernels still read: so its memory is never theirs (torchvision #9606)
_decoding_stream = functools.cache(torch.cuda.Stream)
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")  # the hub's names


class ModelError(RuntimeError):
    """A model that cannot be used: unknown, without weights, or not reachable. The message says what to do."""


def pick_device(device: str = "auto") -> torch.device:
    """Return the device to compute on: "auto" takes CUDA, then Apple MPS, then the CPU. ModelError where it is not here."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=best if device == "auto" else device).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition(".")[0]
        raise ModelError(f"Device {device!r} cannot be used here ({why}): take auto or cpu.") from error


def hub_problem() -> str:
    """Return why the Hugging Face hub does not answer within 3 seconds; "" where it does."""
    try:  # once: open_clip would have it tried for half a minute
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception as error:  # also for addresses and proxies that are none, and certificates that are not there
        settings = "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE or HF_ENDPOINT"
        return f"{constants.ENDPOINT} cannot be reached ({error}). Where there is a network, is {settings} wrong?"
    return ""


def find_weights(model: str, pretrained: str = "openai", problem: str = "") -> Path:
    """Return the file here that `ClipScorer(model, pretrained)` takes; ModelError, with `problem`, where none is."""
    schema, _, name = model.rpartition(":")
    record = open_clip.get_pretrained_cfg(model, pretrained)
    if repository := name if schema == "hf-hub" else record.get("hf_hub", "").rpartition("/")[0]:
        found: list[Any] = [try_to_load_from_cache(repository, file) for file in WEIGHTS]
        advice = f"`hf download {repository}` gets them where there is a network"
    else:
        found = sorted(map(str, Path(name).glob("*.safetensors"))) if schema else [pretrained]
        advice = f"give one of open_clip.list_pretrained(), a checkpoint's path, or a folder with {WEIGHTS[0]}"
    for file in found:
        if isinstance(file, str) and os.path.isfile(file):
            return Path(file)
    why = f"The weights of {model} {pretrained} are not on this machine{problem and ', and '}{problem}"
    raise ModelError(f"{why}: {advice}; or take the sample's {SAMPLE_MODEL!r}.")


def _load(model: str, pretrained: str, precision: str, device: torch.device) -> tuple[Any, Any, dict[str, Any]]:
    """Return open_clip's model, tokenizer and configuration. Raises ModelError."""
    record, schema = open_clip.get_pretrained_cfg(model, pretrained), model.rpartition(":")[0]
    is_file = not (record or schema)
    asks = record or schema == "hf-hub" or is_file and "hf_" in str(open_clip.get_model_config(model))  # a tokenizer
    problem = hub_problem() if asks else ""
    if problem or is_file:
        find_weights(model, pretrained, problem)
    options = {"precision": precision, "device": device, "force_quick_gelu": bool(record.get("quick_gelu"))}
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or problem != ""  # then its cache is all that is asked, and answers at once
    try:
        if is_file and f"{model}-quickgelu" in open_clip.list_models():
            weight = open_clip.factory.load_state_dict(pretrained)["visual.conv1.weight"]
            halves = weight.dtype != torch.bfloat16 and torch.equal(weight.half().to(weight.dtype), weight)
            if halves or "openai" in Path(pretrained).name.lower():  # made in half precision, even if stored in single
                raise ValueError(f"OpenAI's weights need the model '{model}-quickgelu'.")
        net = open_clip.create_model(model, pretrained, require_pretrained=True, **options)
        return net, open_clip.get_tokenizer(model), open_clip.get_model_config(model)
    except Exception as error:  # whatever damaged files lead to
        what = f"{model} {pretrained} or its tokenizer could not be loaded{problem and ', and '}{problem}"
        if "weights_only" in str(error):  # PyTorch's advice would run it
            error = ValueError("it holds code or objects, not weights alone: save its state_dict as safetensors")
        raise ModelError(f"{what}: {error}.") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def cache_folder() -> str:
    """Return where features are kept: `BSAP_CACHE` where it is set (empty: nowhere), else the clone's data/cache."""
    return os.environ.get("BSAP_CACHE", str(ROOT / "data/cache"))


def cache_files(space: str = f"*{HEX}") -> list[Path]:
    """Return the cache's own files, of a space or all, also unfinished ones: named by us, in the folder itself, no links."""
    found = Path(cache_folder()).glob(f"{space}-{HEX}*.safetensors") if space and cache_folder() else ()
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def digest(*parts: Any) -> str:
    """Return 32 hexadecimal digits for bytes, or for whatever `repr` writes the same way every time."""
    content = parts[0] if isinstance(parts[0], bytes) else repr(parts).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def find_features(space: str, keys: Sequence[str], width: int) -> Tensor:
    """Return the features [N, width] kept under N keys, NaN where none are. A file that cannot be used is a warning."""
    features = torch.full((len(keys), width), torch.nan)
    for path in cache_files(space):
        content = b""
        with contextlib.suppress(OSError, MemoryError):
            content = path.read_bytes()
        if digest(content) != path.stem[33:]:
            warnings.warn(f"{path} is damaged or unreadable: `bsap cache clear` removes it.", stacklevel=3)
            continue
        stored = safetensors.torch.load(content)
        place = torch.from_numpy(pd.Index([bytes(key).hex() for key in stored["keys"].numpy()]).get_indexer(keys))
        features[place >= 0] = stored["features"][place[place >= 0]]
    return features


def keep_features(space: str, keys: Sequence[str], features: Tensor) -> None:
    """Keep features under N keys. A cache that cannot be written is a warning: the run goes on without."""
    rows = {key: row for row, key in enumerate(keys) if features[row].isfinite().all()}
    if not space or not rows:
        return
    table = torch.frombuffer(bytearray.fromhex("".join(rows)), dtype=torch.uint8).view(-1, 16)
    content = safetensors.torch.save({"keys": table, "features": features[list(rows.values())]})
    try:
        write_file(Path(cache_folder(), f"{space}-{digest(content)}.safetensors"), content)
    except (OSError, DatasetError) as error:
        warnings.warn(f"Features could not be kept ({error}): free space, or set BSAP_CACHE.", stacklevel=3)


def read_image(ds: ReferDataset, image_id: int, device: torch.device | str = "cpu") -> Tensor:
    """Return an image as uint8 [3, H, W] on `device`; on CUDA, nvJPEG decodes what it can. Raises as `ds.load_image`."""
    path = ds.image_path(image_id)
    if torch.device(device).type == "cuda" and path.suffix.lower() in (".jpg", ".jpeg"):
        here, own = torch.cuda.current_stream(device), _decoding_stream(device)
        with contextlib.suppress(AttributeError, RuntimeError):  # what it refuses, PIL decodes, or says what is wrong
            with torch.cuda.stream(own):
                image = torchvision.io.read_file(str(path))
                image = torchvision.io.decode_jpeg(image, torchvision.io.ImageReadMode.RGB, device)
            here.wait_stream(own)
            image.record_stream(here)
            if list(image.shape[1:]) == ds.images.loc[image_id, ["height", "width"]].tolist():
                return image
    return pil_to_tensor(ds.load_image(image_id)).to(device)


def ahead(function: Callable, groups: Iterable[Sequence]) -> Iterator[list]:
    """Yield [function(item), …] of each group; threads, of one core each, are at work on the next one meanwhile."""
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        begun = (pool.map(function, group) for group in groups)
        for results, _ in itertools.pairwise(itertools.chain(begun, [()])):
            yield list(results)


class ClipScorer:
    """An open_clip model that turns images, regions and texts into features, and those into logits.

    `model`, `pretrained`: any pair that open_clip knows, or a model's name and the path of a checkpoint; or, with weights
    of their own, `hf-hub:OWNER/NAME` and `local-dir:FOLDER`. `device="auto"` takes CUDA, then Apple MPS, then the CPU;
    `precision="auto"` bf16 on a GPU that has it, else fp32. `batch_size` pictures or texts are encoded at once (0: 32 on
    a CPU, else 1,024), half as many as often as the device runs out of memory. Features are unit vectors, float32, on the
    CPU and, with `cache`, kept on disk. Raises ModelError.
    """

    def __init__(self, model: str = "ViT-B-32", pretrained: str = "openai", device: str = "auto", precision: str = "auto",
                 batch_size: int = 0, cache: bool = True) -> None:  # fmt: skip
        self.device = pick_device(device)
        bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = precision if precision != "auto" else "bf16" if bf16 else "fp32"
        if self.precision not in DTYPES:
            raise ModelError(f"Unknown precision {precision!r}: use auto, {', '.join(DTYPES)}.")
        self.model_name, self.pretrained, self.dtype = model, "" if ":" in model else pretrained, DTYPES[self.precision]
        self.model, self.tokenizer, config = _load(model, self.pretrained, self.precision, self.device)
        self.model.eval().requires_grad_(False).visual.to(memory_format=torch.channels_last)
        self.batch_size = batch_size or (32 if self.device.type == "cpu" else 1024)
        self.cache, self.width = cache, config["embed_dim"]
        self.preprocess: dict[str, Any] = self.model.visual.preprocess_cfg
        self.image_size = tuple(np.broadcast_to(self.preprocess["size"], 2).tolist())  # height, width
        self.interpolation = "bilinear" if self.preprocess["interpolation"] == "bilinear" else "bicubic"
        mean, std = (torch.tensor(self.preprocess[name], device=self.device).view(3, 1, 1) for name in ("mean", "std"))
        self._scale, self._shift = 1 / (255 * std), -mean / std  # of uint8: (pixel / 255 - mean) / std in one pass
        self.logit_scale = float(self.model.logit_scale.exp())
        self.logit_bias = float(getattr(self.model, "logit_bias", None) or 0.0)  # SigLIP's
        self._texts: dict[str, Tensor] = {}  # features of the texts encoded so far

    def _pixels(self, views: Tensor) -> Tensor:
        """Turn [N, 3, S, S] uint8 on any device into the model's input."""
        pixels = torch.addcmul(self._shift, views.to(self.device, non_blocking=True).float(), self._scale)
        return pixels.to(self.dtype, memory_format=torch.channels_last)

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
        if isinstance(texts, str):
            raise ValueError(f"{texts!r} would be taken as {len(texts)} texts of a letter: pass a list of texts.")
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
        last = self.tokenizer([*texts, ""], context_length=self.tokenizer.context_length + 1)[:, -1]  # of "": padding
        if truncated := int((last != last[-1]).sum()):
            warnings.warn(f"{truncated} of {len(texts)} texts are too long for the model: cut off.", stacklevel=3)
        features = self._in_batches(lambda part: self.model.encode_text(part.to(self.device)), self.tokenizer(texts))
        return normalize(features, dim=-1).cpu()

    def encode_regions(self, ds: ReferDataset, candidates: pd.DataFrame, visual_prompts: Sequence[str] = ("crop", "blur"),
                       global_weight: float = 0.95) -> Tensor:  # fmt: skip
        """Encode every candidate under every visual prompt: [V, C, D]; what the cache knows is not encoded again.

        `candidates`: a row each: image_id, x, y, w, h in pixels and, for prompts that show masks, segmentation. Global-Local
        CLIP's "global_local" (Yu et al., CVPR 2023) is w · g + (1 - w) · l, not yet normalized: g the whole image's with the
        patches outside the mask hidden, l mask_crop's, w = `global_weight` (there 0.95, and 0.85 for RefCOCOg). Raises
        DatasetError, ModelError, and ValueError for a prompt that is not in VISUAL_PROMPTS.
        """
        self._check_regions(ds, candidates, visual_prompts)
        spaces = [self._space(name, global_weight * (name == "global_local")) for name in visual_prompts]
        keys = _region_keys(ds, candidates) if any(spaces) else [""] * len(candidates)
        features = torch.stack([find_features(space, keys, self.width) for space in spaces])
        missing, boxes = features.isnan().any(-1), torch.tensor(candidates[XYWH].to_numpy(np.float32))
        groups = self._groups(ds, candidates, missing)

        def show(job: tuple[int, Tensor]) -> dict[str, tuple]:
            """Return image, masks, rows and views of an image's candidates, for each visual prompt that some lack."""
            image, rows, parts, masks = read_image(ds, job[0], self.device), job[1], {}, None
            if MASK_PROMPTS.intersection(visual_prompts):
                masks = torch.from_numpy(decode_masks(candidates["segmentation"].iloc[rows.numpy()], *image.shape[1:]))
            for name, lacks in zip(visual_prompts, missing[:, rows], strict=True):
                if lacks.any():
                    own = None if masks is None else masks[lacks].to(self.device)
                    views = show_regions(image, boxes[rows[lacks]], name, self.image_size, own, self.interpolation)
                    parts[name] = image, own, rows[lacks], views
            return parts

        for shown in tqdm(ahead(show, groups), "Encoding", len(groups), delay=2, leave=False):
            for name, space, found in zip(visual_prompts, spaces, features, strict=True):
                if parts := [of_image[name] for of_image in shown if name in of_image]:
                    rows = torch.cat([rows for _, _, rows, _ in parts])
                    found[rows] = self._encode_parts(name, parts, global_weight)
                    keep_features(space, [keys[row] for row in rows], found[rows])
        return features

    def _check_regions(self, ds: ReferDataset, candidates: pd.DataFrame, visual_prompts: Sequence[str]) -> None:
        """Raise ValueError, ModelError or DatasetError for what `encode_regions` cannot do, before it encodes."""
        if unknown := [name for name in visual_prompts if name not in VISUAL_PROMPTS]:
            raise ValueError(f"Unknown visual prompt {unknown[0]!r}: pass a list of {', '.join(VISUAL_PROMPTS)}.")
        if "global_local" in visual_prompts and not has_patch_tokens(self.model.visual):
            raise ModelError(f"'global_local' hides patches, but {self.model_name} has no class token over such.")
        unmasked = "segmentation" not in candidates or candidates["segmentation"].isna().any()
        if unmasked and MASK_PROMPTS.intersection(visual_prompts):
            raise DatasetError(f"Candidates without a mask, which {visual_prompts} need: take PROPOSALS gt or masks.")
        if absent := ds.missing_images():
            raise DatasetError(f"{len(absent)} images are not in {ds.image_root}, as {absent[0]}: see `bsap data get`.")

    def _groups(self, ds: ReferDataset, candidates: pd.DataFrame, missing: Tensor) -> list[list[tuple[int, Tensor]]]:
        """Return groups of images, as many as are encoded at once, each with its rows that are `missing` [V, C]."""
        rows = missing.any(0).nonzero().ravel().numpy()
        by_image = pd.Series(rows).groupby(candidates["image_id"].to_numpy()[rows], sort=False)
        jobs = [(image_id, torch.tensor(own.to_numpy())) for image_id, own in by_image]
        room = 2**26 // max(ds.images["width"] * ds.images["height"], default=1)  # for pictures of 200 MB
        step = 1 + min(max(256, 4 * self.batch_size) * len(jobs) // (int(missing.sum()) + 1), room)  # images
        return [jobs[start : start + step] for start in range(0, len(jobs), step)]

    def _encode_parts(self, name: str, parts: list[tuple], global_weight: float) -> Tensor:
        """Encode what `show` made of a group of images under a visual prompt, in its order: [n, D]."""
        features = self._encode_views([views for *_, views in parts])
        if name == "global_local":
            whole = torch.cat([self._whole(image, masks) for image, masks, *_ in parts])
            features = global_weight * whole + (1 - global_weight) * features
        return normalize(features, dim=-1).cpu()

    def _whole(self, image: Tensor, masks: Tensor) -> Tensor:
        """Return the whole image's features with the patches outside of each mask hidden, not normalized: [N, D]."""
        pixels = self._pixels(squash(image, self.image_size, self.interpolation)[None])
        keep = patch_masks(masks, self.model.visual.grid_size)
        return self._in_batches(lambda part: encode_masked(self.model.visual, pixels, part), keep)

    def _space(self, prompt: str, *about: Any) -> str:
        """Return the space of features; "" if none are kept, as of a prompt of one's own, whose code may call others."""
        own = prompt and VISUAL_PROMPTS[prompt] not in visual_prompts.OURS
        if own or not (self.cache and cache_folder()):
            return ""
        code = [inspect.getsource(one) for one in (visual_prompts, encode_masked, open_picture, decode_masks) if prompt]
        versions = [one.__version__ for one in (torch, torchvision, open_clip, Image)]
        how = [self.model_name, self.pretrained, repr(self.model), self.preprocess, self.precision, self.device.type]
        return digest(self.weights_hash, how, versions, prompt, code, about)

    @functools.cached_property
    def weights_hash(self) -> str:
        """Return 12 hexadecimal digits that change whenever the weights do."""
        state = sorted(self.model.state_dict().items())
        digests = [digest(one.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()) for _, one in state]
        return digest([name for name, _ in state], digests)[:12]

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Return `logit_scale · cos`, plus SigLIP's bias, [C, T]: of image features [C, D], or the mean over V of [V, C, D]."""
        return self.logit_scale * (image.mean(0) if image.ndim == 3 else image) @ text.T + self.logit_bias

    def pair_logits(self, image: Tensor, text: Tensor, pairs: Pairs) -> Tensor:
        """Return the logit of every pair [P], as `logits` has it; row e of `text` [E, D] is the e-th expression."""
        mean = image.mean(0) if image.ndim == 3 else image
        parts = zip(pairs.candidate.split(2**16), pairs.expression.split(2**16), strict=True)  # no [P, D] at a time
        cosines = torch.cat([(mean[candidate] * text[expression]).sum(-1) for candidate, expression in parts])
        return self.logit_scale * cosines + self.logit_bias


def _region_keys(ds: ReferDataset, candidates: pd.DataFrame) -> list[str]:
    """Return the cache's keys of candidates: of their pictures' bytes, boxes and, where they have some, masks."""
    ids, boxes = candidates["image_id"].unique(), candidates[XYWH].to_numpy(np.float64).tolist()
    pictures = dict(zip(ids, *ahead(lambda one: digest(read_bytes(ds.image_path(one))), [ids]), strict=True))
    masks = candidates.get("segmentation", [None] * len(candidates))
    return [digest(pictures[i], box, mask) for i, box, mask in zip(candidates["image_id"], boxes, masks, strict=True)]


class Ensemble(ClipScorer):
    """Several models as one (ReCLIP uses two): logits are the mean of theirs, features, of unit length, lie side by side."""

    def __init__(self, scorers: Sequence[ClipScorer]) -> None:
        self.scorers, scales = scorers, np.array([one.logit_scale for one in scorers])
        self.model_name = " + ".join(one.model_name for one in scorers)
        self.pretrained = " + ".join(one.pretrained for one in scorers)
        self.logit_scale, self.logit_bias = float(scales.mean()), float(np.mean([one.logit_bias for one in scorers]))
        self.shares = np.sqrt(scales / scales.sum()).tolist()

    def _joined(self, verb: str, *arguments: Any, **options: Any) -> Tensor:
        theirs = [getattr(scorer, verb)(*arguments, **options) for scorer in self.scorers]
        return torch.cat([share * features for share, features in zip(self.shares, theirs, strict=True)], dim=-1)

    encode_images = functools.partialmethod(_joined, "encode_images")  # type: ignore[assignment]
    encode_texts = functools.partialmethod(_joined, "encode_texts")  # type: ignore[assignment]
    encode_regions = functools.partialmethod(_joined, "encode_regions")  # type: ignore[assignment]


def load_scorer(models: str | Sequence[str], pretrained: str | Sequence[str] = "openai", device: str = "auto",
                **options: Any) -> ClipScorer:  # fmt: skip
    """Return the scorer of a model, or of several with as many (or one) `pretrained`, averaged. Raises ModelError."""
    names, tags = np.atleast_1d(models), np.atleast_1d(pretrained)
    if len(tags) not in (1, len(names)):
        raise ModelError(f"{len(names)} models and {len(tags)} pretrained: give as many, or one.")
    scorers = [ClipScorer(str(name), str(tag), device, **options) for name, tag in np.broadcast(names, tags)]
    return scorers[0] if len(scorers) == 1 else Ensemble(scorers)
