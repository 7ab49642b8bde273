"""CLIP scoring: each region and each distinct text encoded once, and the logits that every correction starts from."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import inspect
import itertools
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import huggingface_hub
import numpy as np
import open_clip
import pandas as pd
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as transforms
from tqdm.auto import tqdm

from . import cache as feature_cache
from . import visual_prompts as visual_prompts_module
from .datasets import XYWH, DatasetError, ReferDataset
from .proposals import decode_masks
from .visual_prompts import MASK_PROMPTS, VISUAL_PROMPTS, patch_masks, show_regions, squash

Item = TypeVar("Item")
Result = TypeVar("Result")
TEMPLATE = "a photo of {}"  # ReCLIP's text: "a photo of " + the expression in lower case
SAMPLE_MODEL = "local-dir:data/clip-refshapes"
READERS = 4  # threads that read, decode and unpack masks ahead of the encoder (tests/benchmarks/encoding.py)
KEEP_EVERY = 30  # seconds of encoding that an interruption may lose


class ModelError(RuntimeError):
    """A model that cannot be used: unknown, without weights, or not reachable. The message says what to do."""


def pick_device(device: str = "auto") -> torch.device:
    """Return the device to compute on: "auto" takes CUDA, then Apple MPS, then the CPU.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(precision: str, device: torch.device) -> str:
    """Return open_clip's name of the precision: "auto" is bf16 on a GPU that has it, else fp32.

    >>> pick_precision("auto", torch.device("cpu"))
    'fp32'
    """
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 6, 0.3) or sorted(known)[:6]
    return ", ".join(close)


def _hub_is_reachable() -> bool:
    """Ask the hub once, for three seconds at most: its own client would go on trying for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(huggingface_hub.constants.ENDPOINT, timeout=3)
    except httpx.HTTPError:
        return False
    return True


def _where_to_get(model: str, pretrained: str) -> str:
    """Say what to download, from where, and where to put it."""
    if model.startswith("hf-hub:"):
        repository, file = model.removeprefix("hf-hub:"), "open_clip_config.json and open_clip_model.safetensors"
        use = f"put both into a folder and use model='local-dir:FOLDER' (its tokenizer files too, if {repository} has some)"
    else:
        record = open_clip.get_pretrained_cfg(model, pretrained)
        repository, _, file = record.get("hf_hub", "").rpartition("/")
        file = file or "open_clip_model.safetensors (or open_clip_pytorch_model.bin)"
        use = f"put it anywhere and use model={model!r}, pretrained='PATH/TO/FILE'"
        if not repository:
            return f"download {record.get('url')} on a machine with a network; {use}"
    return (f"on a machine with a network download {file} from {huggingface_hub.constants.ENDPOINT}/{repository}; {use}. "
            f"Or copy that machine's Hugging Face cache to {huggingface_hub.constants.HF_HUB_CACHE}")  # fmt: skip


def _is_openai(model: str, pretrained: str) -> bool:
    """Tell whether these are OpenAI's weights: all have QuickGELU, and everybody calls them by the plain model name."""
    return pretrained.lower() == "openai" and bool(open_clip.get_pretrained_cfg(model, pretrained))


def _check_names(model: str, pretrained: str) -> None:
    """Raise ModelError, with the nearest known names, for what open_clip does not know or would load wrongly."""
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise ModelError(
                f"{folder}: no open_clip_config.json there. Give an open_clip model's folder, e.g. {SAMPLE_MODEL}."
            )
        return
    if model.startswith("hf-hub:"):
        return
    if model not in open_clip.list_models():
        raise ModelError(f"open_clip has no model {model!r}. Nearest: {_nearest(model, open_clip.list_models())}. "
                         "Also possible: 'hf-hub:OWNER/NAME' or 'local-dir:FOLDER'.")  # fmt: skip
    tags = open_clip.list_pretrained_tags_by_model(model)
    record = open_clip.get_pretrained_cfg(model, pretrained)
    # a tag trained without QuickGELU is not listed for a "-quickgelu" model, so a mismatch has this direction only
    lacks = bool(record.get("quick_gelu")) and not open_clip.get_model_config(model).get("quick_gelu")
    if lacks and not _is_openai(model, pretrained):
        raise ModelError(f"QuickGELU mismatch: the weights {pretrained!r} were trained with it, and {model} computes "
                         f"without. Use model={model + '-quickgelu'!r}.")  # fmt: skip
    if record or Path(pretrained).is_file():
        return
    if not pretrained:
        raise ModelError(
            f"{model} without weights would be a random network. Set pretrained= to a file, or one of: {', '.join(tags)}."
        )
    if "/" in pretrained or Path(pretrained).suffix:
        raise ModelError(
            f"{pretrained}: no such checkpoint file. Give a file, or one of {model}'s tags: {', '.join(tags)}."
        )
    raise ModelError(f"open_clip has no weights {pretrained!r} for {model}. Nearest: {_nearest(pretrained, tags)}.")


def _load(model: str, pretrained: str, precision: str, device: torch.device) -> Any:
    _check_names(model, pretrained)
    needs_hub = model.startswith("hf-hub:") or bool(open_clip.get_pretrained_cfg(model, pretrained))
    offline = needs_hub and not _hub_is_reachable()
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = (
        before or offline
    )  # its cache then answers at once, without a try at the network
    try:
        return open_clip.create_model(
            model, pretrained or None, precision=precision, device=device, require_pretrained=True,
            force_quick_gelu=_is_openai(model, pretrained),
        )  # fmt: skip
    except Exception as error:
        name = f"{model} {pretrained}".strip()
        if offline:
            raise ModelError(f"The weights of {name} are not on this machine, and {huggingface_hub.constants.ENDPOINT} cannot "
                             f"be reached. What to do: {_where_to_get(model, pretrained)}. Without weights, the sample "
                             f"model works: model='{SAMPLE_MODEL}'.") from error  # fmt: skip
        whole = "Check that the file is whole and of this model"
        remedy = f"If a download keeps failing: {_where_to_get(model, pretrained)}" if needs_hub else whole
        raise ModelError(f"{name} could not be loaded: {' '.join(str(error).split())}. {remedy}.") from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def read_image(ds: ReferDataset, image_id: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return an image as uint8 [3, H, W] on `device`; on CUDA, nvJPEG decodes what it can. Raises DatasetError as `load_image`.

    >>> from bsap_utils.datasets import load_refer
    >>> ds = load_refer("data/refshapes", "refshapes")
    >>> read_image(ds, ds.images.index[0]).shape
    torch.Size([3, 240, 320])
    """
    device, path = torch.device(device), ds.image_path(image_id)
    if device.type == "cuda" and path.suffix.lower() in (".jpg", ".jpeg"):
        with contextlib.suppress(
            ImportError, RuntimeError
        ):  # what it refuses, PIL decodes, or says what is wrong with it
            image = decode_jpeg(path, device)
            if list(image.shape[1:]) == ds.images.loc[image_id, ["height", "width"]].tolist():
                return image
    return transforms.pil_to_tensor(ds.load_image(image_id)).to(device)


def decode_jpeg(path: Path, device: torch.device | str) -> torch.Tensor:
    """Return a JPEG as uint8 [3, H, W], decoded on `device`. Raises RuntimeError for what is no whole JPEG.

    On a CPU, torchvision decodes to the same pixels as PIL, and no faster. (Since 0.29 it announces to leave this to
    torchcodec: hence imported only where it is used.)
    """
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return decode_jpeg(read_file(str(path)), ImageReadMode.RGB, device)


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], threads: int = READERS) -> Iterator[Result]:
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


def encode_masked(visual: Any, pixels: torch.Tensor, keep: torch.Tensor, from_block: int | None = None) -> torch.Tensor:
    """Encode one image for N regions, the patches outside of each region hidden: [N, D], not normalized.

    `visual` is an image tower with patch tokens (`has_patch_tokens`), `pixels` [1, 3, S, S] its input, and `keep`
    [N, patches] bool what `patch_masks` gives. From block `from_block` on (0 is the first) no token attends to a hidden
    patch, as if it had been dropped; the blocks before run once for all regions. The default is the last quarter of the
    blocks, as in Global-Local CLIP (Yu et al., CVPR 2023: from 9 of 12). Their code sets hidden tokens to zero before
    each of these blocks, which leaves them a share of the attention. With every patch kept, it is the plain feature. Raises
    ValueError for a block that the tower does not have.
    """
    blocks = visual.transformer.resblocks
    from_block = len(blocks) * 3 // 4 if from_block is None else from_block
    if not 0 <= from_block < len(blocks):
        raise ValueError(f"from_block is {from_block}; the image tower has the blocks 0 to {len(blocks) - 1}.")
    hidden = torch.cat([torch.zeros_like(keep[:, :1]), ~keep], 1)  # the class token comes first and is never hidden

    def for_each_region(block: Any, args: tuple) -> tuple:
        return args[0].expand(len(keep), -1, -1), *args[1:]

    def hide(attention: Any, args: tuple, kwargs: dict) -> tuple:
        return args, {**kwargs, "key_padding_mask": hidden}

    hooks = [blocks[from_block].register_forward_pre_hook(for_each_region)]
    hooks += [block.attn.register_forward_pre_hook(hide, with_kwargs=True) for block in blocks[from_block:]]
    try:
        features = visual(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return features[0] if isinstance(features, tuple) else features


def has_patch_tokens(visual: Any) -> bool:
    """Tell whether an image tower is open_clip's VisionTransformer, whose feature is the class token."""
    return (
        isinstance(visual, open_clip.transformer.VisionTransformer)
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and all(isinstance(block.attn, torch.nn.MultiheadAttention) for block in visual.transformer.resblocks)
    )


def noun_phrases(texts: Sequence[str]) -> tuple[list[str], str]:
    """Return the head noun phrase of each expression, "the man" of "the man left of a car", and what found them.

    The rule is Global-Local CLIP's (Yu et al., CVPR 2023): the noun chunk of the sentence's root or, where that is in
    none, of the root's first child; else the whole expression. The parser is the best English model that spaCy has on
    this machine. Without spaCy or a model the expressions come back as they are, and the second value says so.

    >>> phrases, parser = noun_phrases(["mug"])
    >>> phrases
    ['mug']
    """
    try:
        import spacy
    except ImportError:
        return list(texts), "none: spaCy is not installed"
    for name in ("en_core_web_lg", "en_core_web_trf", "en_core_web_md", "en_core_web_sm"):
        if spacy.util.is_package(name):
            parser = spacy.load(name)
            return [_noun_phrase(parsed) for parsed in parser.pipe(texts)], f"spaCy {name} {parser.meta['version']}"
    return list(texts), "none: spaCy has no English model here (python -m spacy download en_core_web_lg)"


def _noun_phrase(parsed: Any) -> str:
    chunk_of = {token.i: chunk for chunk in parsed.noun_chunks for token in chunk}
    root = [token for token in parsed if token.head.i == token.i][-1:]
    heads = [token for token in root + [child for token in root for child in token.children][:1] if token.i in chunk_of]
    return chunk_of[heads[0].i].text if heads else parsed.text


class ClipScorer:
    """An open_clip model that turns images, regions and texts into unit vectors, and those into logits.

    `model`, `pretrained`: any pair that open_clip knows; or `hf-hub:OWNER/NAME`, or `local-dir:FOLDER` (both bring
    their own weights); or a model name with `pretrained` the path of a checkpoint file. `device="auto"` takes CUDA, then
    Apple MPS, then the CPU;
    `precision="auto"` takes bf16 on a GPU that has it, else fp32. `batch_size` pictures or texts are encoded at once; 0 takes
    16 on a CPU, where more is no faster, else 1,024. It is halved as often as the device runs out of memory.
    With `cache`, features of regions and texts are kept on disk (`cache.folder`), and encoded only where they are not there.
    Raises ModelError: a model is never used without weights.

    >>> scorer = ClipScorer("local-dir:data/clip-refshapes", device="cpu")
    >>> scorer.encode_texts(["a photo of red star", "a photo of key"]).shape
    torch.Size([2, 64])
    """

    def __init__(self, model: str = "ViT-B-32", pretrained: str = "openai", device: str = "auto", precision: str = "auto",
                 batch_size: int = 0, cache: bool = True) -> None:  # fmt: skip
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        own_weights = model.startswith(("local-dir:", "hf-hub:"))
        self.model_name, self.pretrained = model, "" if own_weights else pretrained
        self.model: Any = _load(model, self.pretrained, self.precision, self.device).eval()
        self.model.visual.to(memory_format=torch.channels_last)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.batch_size = batch_size or (16 if self.device.type == "cpu" else 1024)
        self.cache = cache
        preprocess = self.model.visual.preprocess_cfg
        size = preprocess["size"]
        self.image_size: int | tuple[int, int] = size if isinstance(size, int) else tuple(size)
        mean, std = (torch.tensor(preprocess[name], device=self.device).view(3, 1, 1) for name in ("mean", "std"))
        self._scale, self._shift = 1 / (255 * std), -mean / std  # of uint8: (pixel / 255 - mean) / std in one pass
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            self.precision.removeprefix("pure_"), torch.float32
        )
        self.logit_scale = float(self.model.logit_scale.detach().exp())
        bias = getattr(self.model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias.detach())  # SigLIP
        self._text_features: dict[str, torch.Tensor] = {}

    def _pixels(self, views: torch.Tensor) -> torch.Tensor:
        """Turn [N, 3, S, S] uint8 on any device into the model's input."""
        pixels = torch.addcmul(self._shift, views.to(self.device, non_blocking=True).float(), self._scale)
        return pixels.to(self._dtype, memory_format=torch.channels_last)

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

    def _encode_stream(self, views: Iterable[torch.Tensor]) -> torch.Tensor:
        """Encode a stream of [n, 3, S, S] uint8 in full batches, whatever the n: [N, D], not normalized, on the CPU."""

        def encode(batch: torch.Tensor) -> torch.Tensor:
            return self.model.encode_image(self._pixels(batch))

        features: list[torch.Tensor] = []
        buffer: list[torch.Tensor] = []
        with torch.inference_mode():
            for block in views:
                buffer.append(block)
                if sum(map(len, buffer)) >= self.batch_size:
                    joined = torch.cat(buffer)
                    whole = len(joined) - len(joined) % self.batch_size
                    features.append(self._in_batches(encode, joined[:whole]))
                    buffer = [joined[whole:]]
            if sum(map(len, buffer)):
                features.append(self._in_batches(encode, torch.cat(buffer)))
        if not features:
            raise ValueError("Nothing to encode: no images or regions were given.")
        return torch.cat(features).cpu()

    def encode_images(self, images: Iterable[Image.Image | torch.Tensor]) -> torch.Tensor:
        """Encode PIL images or uint8 tensors [3, H, W], squashed to the model's square: [N, D] unit vectors on the CPU."""

        def views() -> Iterator[torch.Tensor]:
            for image in images:
                pixels = image if isinstance(image, torch.Tensor) else transforms.pil_to_tensor(image.convert("RGB"))
                yield squash(pixels.to(self.device), self.image_size)[None]

        return torch.nn.functional.normalize(self._encode_stream(views()), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode texts as they are (no template): [N, D] unit vectors, float32, on the CPU. Each distinct text is encoded once.

        Texts over the model's context length are truncated, as CLIP does; a warning says how many. Raises ValueError
        when there is no text.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._text_features]
        if new:
            length = self.tokenizer.context_length
            tokens = self.tokenizer(new)
            padding = self.tokenizer([""], context_length=length + 1)[0, -1]
            truncated = int((self.tokenizer(new, context_length=length + 1)[:, -1] != padding).sum())
            if truncated:
                warnings.warn(f"{truncated} of {len(new)} texts are longer than the {length} tokens of {self.model_name}; "
                              "their ends are cut off.", stacklevel=2)  # fmt: skip
            space = self._space({"tokenizer": type(self.tokenizer).__name__, "length": length})
            keys, known = [feature_cache.key_of(text) for text in new], torch.zeros(len(new), dtype=torch.bool)
            if space:
                features, known = space.get(keys)
                self._text_features.update(zip(itertools.compress(new, known.tolist()), features[known], strict=True))
            if not known.all():
                with torch.inference_mode():
                    features = self._in_batches(
                        lambda part: self.model.encode_text(part.to(self.device)), tokens[~known]
                    )
                    features = torch.nn.functional.normalize(features, dim=-1).cpu()
                unknown = (~known).tolist()
                self._text_features.update(zip(itertools.compress(new, unknown), features, strict=True))
                if space and len(texts) > 1:  # one that somebody typed is not worth two files
                    space.put(list(itertools.compress(keys, unknown)), features)
        if not len(texts):
            raise ValueError("Nothing to encode: no texts were given.")
        return torch.stack([self._text_features[text] for text in texts])

    def encode_regions(
        self,
        ds: ReferDataset,
        regions: pd.DataFrame,
        visual_prompts: Sequence[str] = ("crop", "blur"),
        global_weight: float = 0.95,
        from_block: int | None = None,
        exact: bool = False,
    ) -> torch.Tensor:
        """Encode every region under every visual prompt: [P, R, D] unit vectors, float32, on the CPU.

        Each image is decoded once, ahead of need; all its regions are cut, blurred and resized on the device, and encoded in
        full batches across images. What the cache knows is not encoded again. `exact` decodes, blurs and resizes with PIL
        instead, as ReCLIP does: slow, and there to be compared with.

        `regions` has one row a candidate, the rows in any order: image_id, x, y, w, h in pixels and, for visual prompts that
        show masks, segmentation. The prompt "global_local" is Global-Local CLIP's (Yu et al., CVPR 2023): `global_weight` · g +
        (1 - `global_weight`) · l of features not yet normalized, where g is the whole image's with the patches outside the mask
        hidden (`encode_masked`), and l that of mask_crop. The paper's weight is 0.95, and 0.85 for RefCOCOg.

        Raises DatasetError for images and masks that are missing or damaged, ValueError for an unknown visual prompt and where
        there is no region, ModelError for global_local with a model that has no class token over patch tokens.
        """
        if "global_local" in visual_prompts and not has_patch_tokens(self.model.visual):
            raise ModelError(f"The visual prompt 'global_local' hides patch tokens, but the image tower of "
                             f"{self.model_name}, {type(self.model.visual).__name__}, has no class token over such. Use "
                             "a ViT of open_clip, e.g. ViT-B-32, or a prompt such as mask_crop.")  # fmt: skip
        if unknown := [name for name in visual_prompts if name not in VISUAL_PROMPTS]:
            raise ValueError(f"Unknown visual prompt {unknown}; there are: {', '.join(VISUAL_PROMPTS)}.")
        if not len(regions) or not len(visual_prompts):
            raise ValueError("Nothing to encode: no regions or no visual prompts were given.")
        segmentations = None if MASK_PROMPTS.isdisjoint(visual_prompts) else _segmentations(ds, regions, visual_prompts)
        missing = ds.missing_images()
        if missing:  # known before hours of work, not after
            raise DatasetError(f"{len(missing)} of {len(ds.images)} images are not in {ds.image_root}, e.g. {missing[0]}. Get "
                               "them with `bsap data get`, or pass the right `image_root`.")  # fmt: skip
        spaces = [self._space(self._view(name, global_weight, from_block, exact)) for name in visual_prompts]
        keys = _region_keys(ds, regions, segmentations) if any(spaces) else {}
        features = torch.zeros(len(visual_prompts), len(regions), 0)
        known = torch.zeros(len(visual_prompts), len(regions), dtype=torch.bool)
        unkept = known.clone()

        def fill(prompt: torch.Tensor | int, row: torch.Tensor, found: torch.Tensor) -> None:
            nonlocal features
            if not features.shape[2]:  # how wide features are, only features tell
                features = torch.full((*known.shape, found.shape[1]), torch.nan)
            features[prompt, row], known[prompt, row] = found, True

        def keep() -> None:
            for prompt, (name, space) in enumerate(zip(visual_prompts, spaces, strict=True)):
                rows = unkept[prompt].nonzero().squeeze(1)
                if space and len(rows):
                    space.put([keys[name in MASK_PROMPTS][row] for row in rows.tolist()], features[prompt, rows])
            unkept.fill_(False)

        for prompt, (name, space) in enumerate(zip(visual_prompts, spaces, strict=True)):
            if space:
                found, there = space.get(keys[name in MASK_PROMPTS])
                if there.any():
                    fill(prompt, there.nonzero().squeeze(1), found[there])
        kept_at = time.monotonic()
        try:
            for prompts, rows, found in self._encode_views(
                ds, regions, segmentations, visual_prompts, ~known, global_weight, from_block, exact
            ):
                fill(prompts, rows, found)
                unkept[prompts, rows] = True
                if time.monotonic() - kept_at > KEEP_EVERY:
                    keep()
                    kept_at = time.monotonic()
        finally:  # an interruption, or a damaged picture, loses nothing that was encoded
            keep()
        return features

    def _encode_views(
        self,
        ds: ReferDataset,
        regions: pd.DataFrame,
        segmentations: np.ndarray | None,
        visual_prompts: Sequence[str],
        wanted: torch.Tensor,
        global_weight: float,
        from_block: int | None,
        exact: bool,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Encode what is `wanted` [P, R], some images at a time: yields visual prompt [n], row [n] and unit features [n, D]."""
        boxes = torch.tensor(regions[XYWH].to_numpy(np.float32))
        jobs = []  # of one image each: its id, the rows that any visual prompt wants, and which of these each wants
        for image_id, rows in regions.groupby("image_id", sort=False).indices.items():
            of_image = wanted[:, rows]
            if of_image.any():
                some = of_image.any(0)
                jobs.append((image_id, torch.from_numpy(rows)[some], of_image[:, some]))

        def load(job: tuple[Any, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
            image_id, rows, _ = job
            image = (
                transforms.pil_to_tensor(ds.load_image(image_id)) if exact else read_image(ds, image_id, self.device)
            )
            if segmentations is None:
                return image, None
            try:
                masks = torch.from_numpy(decode_masks(segmentations[rows.numpy()], *image.shape[1:]))
            except DatasetError as error:
                raise DatasetError(f"Image {image_id}: the mask of a candidate is wrong: {error}. Correct it, or leave "
                                   "this candidate out.") from error  # fmt: skip
            return image, masks.to(image.device)

        def views(part: list, order: list, hidden: list) -> Iterator[torch.Tensor]:
            for (_, rows, of_image), (image, masks) in zip(part, loaded, strict=False):
                for prompt, name in enumerate(visual_prompts):
                    of_prompt, which = masks, of_image[prompt]
                    if not which.any():
                        continue
                    if masks is not None and not which.all():
                        of_prompt = masks[which]
                    if name == "global_local" and of_prompt is not None:
                        pixels = self._pixels(squash(image, self.image_size, exact)[None])
                        for patches in patch_masks(of_prompt, self.model.visual.grid_size).split(self.batch_size):
                            hidden.append(encode_masked(self.model.visual, pixels, patches, from_block).float())
                    order.append((torch.full((int(which.sum()),), prompt), rows[which]))
                    yield show_regions(image, boxes[rows[which]], [name], self.image_size, of_prompt, exact)[0]

        sizes = np.cumsum([int(of_image.sum()) for _, _, of_image in jobs])
        loaded = prefetch(load, tqdm(jobs, desc="Encoding images", delay=2, leave=False))
        for _, group in itertools.groupby(zip(jobs, sizes, strict=True), lambda one: one[1] // (16 * self.batch_size)):
            order: list[tuple[torch.Tensor, torch.Tensor]] = []
            hidden: list[torch.Tensor] = []  # features of the whole image with what is not the region hidden
            features = self._encode_stream(views([job for job, _ in group], order, hidden))
            prompt, row = (torch.cat(parts) for parts in zip(*order, strict=True))
            if hidden:
                mixed = torch.tensor([name == "global_local" for name in visual_prompts])[prompt]
                features[mixed] = (1 - global_weight) * features[mixed] + global_weight * torch.cat(hidden).cpu()
            yield prompt, row, torch.nn.functional.normalize(features, dim=-1)

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What features depend on, whatever is encoded."""
        config = Path(self.model_name.removeprefix("local-dir:")) / "open_clip_config.json"
        return {
            "model": self.model_name, "pretrained": self.pretrained, "weights": self.weights_hash(),
            "architecture": feature_cache.key_of(repr(self.model), config.read_text() if config.is_file() else ""),
            "preprocess": self.model.visual.preprocess_cfg, "precision": self.precision, "device": self.device.type,
            "versions": [torch.__version__, torchvision.__version__, open_clip.__version__],
        }  # fmt: skip

    def _view(self, name: str, global_weight: float, from_block: int | None, exact: bool) -> dict[str, Any] | None:
        """What the features of one visual prompt depend on besides; None for a prompt that is not ours.

        The code of ours tells when a view changes. What else a function of yours depends on, nobody can know.
        """
        function = VISUAL_PROMPTS[name]
        if getattr(function, "__module__", "") != show_regions.__module__:
            return None
        code = [function.__name__, inspect.getsource(visual_prompts_module), inspect.getsource(encode_masked)]
        about = {"visual_prompt": name, "code": feature_cache.key_of(code), "exact": exact}
        return about | ({"global_weight": global_weight, "from_block": from_block} if name == "global_local" else {})

    def _space(self, about: dict[str, Any] | None) -> feature_cache.Space | None:
        """Where features that depend on this scorer and `about` are kept; None where they are not."""
        folder = feature_cache.folder()
        if not self.cache or folder is None or about is None:
            return None
        return feature_cache.Space(folder, {**self._identity, **about})

    def logits(self, features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Return the logits [R, T] of features [R, D] or [P, R, D] (then the mean over the P visual prompts) for texts [T, D].

        `logit_scale · cos`, plus SigLIP's logit bias. ReCLIP sums over prompts: the same ranking for CLIP, but the mean keeps the
        meaning of BSAP's temperature whatever the number of prompts.
        """
        mean = features.mean(0) if features.ndim == 3 else features
        return self.logit_scale * mean @ text_features.T + self.logit_bias

    def weights_hash(self) -> str:
        """Return 12 hexadecimal digits that change whenever the weights do."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]


def _segmentations(ds: ReferDataset, regions: pd.DataFrame, visual_prompts: Sequence[str]) -> np.ndarray:
    """Return the segmentation of each candidate: [R], None for the whole image. Raises DatasetError where one lacks."""
    given = regions["segmentation"].to_numpy(object) if "segmentation" in regions else np.full(len(regions), None)
    there = np.array([isinstance(one, (dict, list)) and len(one) > 0 for one in given], dtype=bool)
    size = ds.images.loc[regions["image_id"], ["width", "height"]].to_numpy()
    without = np.flatnonzero(~there & (regions[["w", "h"]].to_numpy() < size).any(1))
    if len(without):
        names = ", ".join(name for name in visual_prompts if name in MASK_PROMPTS)
        raise DatasetError(f"{len(without)} of {len(regions)} candidates have no segmentation (the first is of image "
                           f"{regions['image_id'].iloc[without[0]]}), which {names} needs. Pass candidates with masks, "
                           "such as those of ground_truth, or choose visual prompts for boxes.")  # fmt: skip
    masks = given.copy()
    masks[~there] = None
    return masks


def _region_keys(ds: ReferDataset, regions: pd.DataFrame, segmentations: np.ndarray | None) -> dict[bool, list[str]]:
    """Return the cache's keys of all regions, without their masks (False) and with them (True)."""
    files = {}
    for image_id in regions["image_id"].unique():
        path = ds.image_path(image_id).absolute()
        files[image_id] = str(path), path.stat().st_size, path.stat().st_mtime_ns
    boxes = zip(regions["image_id"], regions[XYWH].to_numpy(np.float64).tolist(), strict=True)
    keys = [feature_cache.key_of(files[image_id], box) for image_id, box in boxes]
    masks: Sequence[Any] = [] if segmentations is None else segmentations.tolist()
    return {False: keys, True: [feature_cache.key_of(key, mask) for key, mask in zip(keys, masks, strict=False)]}


@dataclass(frozen=True)
class ReferLogits:
    """The logits of one evaluation; every correction of `normalization.METHODS` is a function of the first three.

    `query` [R, Q]: column j of a region is the j-th expression of *its own* image, NaN where the image has fewer; `aux` [R, M];
    `group` [R]: the image (0..G-1) of each region. Expression e of the data set stands in `query[group == expression_group[e],
    expression_slot[e]]`.
    """

    query: torch.Tensor
    aux: torch.Tensor
    group: torch.Tensor
    expression_group: torch.Tensor
    expression_slot: torch.Tensor
    noun_parser: str = ""  # who found the head noun phrases, as `noun_phrases` says it; "" where none were asked for


def refer_logits(
    scorers: Sequence[ClipScorer],
    ds: ReferDataset,
    regions: pd.DataFrame,
    aux_prompts: Sequence[str],
    visual_prompts: Sequence[str] = ("crop", "blur"),
    template: str = TEMPLATE,
    head_noun_weight: float = 1.0,
    global_weight: float = 0.95,
    features: Sequence[torch.Tensor] | None = None,
) -> ReferLogits:
    """Score the candidate regions of every image against its expressions and the auxiliary prompts.

    Several scorers (ReCLIP uses two) are averaged. `global_weight` is that of `ClipScorer.encode_regions`. With
    `head_noun_weight` r < 1, the text is r · expression + (1 - r) · its head noun phrase (`noun_phrases`), unit vectors,
    normalized again; Global-Local CLIP (Yu et al., CVPR 2023) has r = 0.5, and mixes before it normalizes. `features`,
    one [P, R, D] for each scorer as `encode_regions` gives them, are used where passed: nothing is encoded twice. Raises
    DatasetError when an image with expressions has no candidate region.
    """
    names, group = np.unique(regions["image_id"].to_numpy(), return_inverse=True)
    expressions = ds.expressions
    without = sorted(set(expressions["image_id"]) - set(names))
    if without:
        raise DatasetError(f"{len(without)} images with expressions have no candidate region, e.g. image {without[0]}. "
                           "Pass proposals of all images: from_boxes adds the whole image where there was none.")  # fmt: skip
    expression_group = torch.from_numpy(np.searchsorted(names, expressions["image_id"].to_numpy()))
    slot = torch.from_numpy(expressions.groupby("image_id").cumcount().to_numpy(copy=True))
    texts = [template.format(text.lower()) for text in expressions["text"]]
    aux_texts = [template.format(text.lower()) for text in aux_prompts]
    noun_parser = ""
    if head_noun_weight < 1:
        phrases, noun_parser = noun_phrases([text.lower() for text in expressions["text"]])
        phrases = [template.format(phrase) for phrase in phrases]

    # every (region, expression of its image) pair: the text features are gathered per pair, never as a full [R, T] matrix
    row_of_slot = torch.full((len(names), int(slot.max()) + 1), -1)
    row_of_slot[expression_group, slot] = torch.arange(len(texts))
    pairs = row_of_slot[torch.from_numpy(group)]  # [R, Q]: row of `expressions`, or -1
    region_row, column = (pairs >= 0).nonzero(as_tuple=True)
    query = torch.full(pairs.shape, 0.0)
    aux = torch.zeros(len(regions), len(aux_texts))
    for number, scorer in enumerate(scorers):
        shown = features[number] if features else scorer.encode_regions(ds, regions, visual_prompts, global_weight)
        region_features = shown.mean(0)
        text_features = scorer.encode_texts(texts)
        if noun_parser:
            mixture = head_noun_weight * text_features + (1 - head_noun_weight) * scorer.encode_texts(phrases)
            text_features = torch.nn.functional.normalize(mixture, dim=-1)
        aux += scorer.logits(region_features, scorer.encode_texts(aux_texts)) / len(scorers)
        for part in torch.arange(len(region_row)).split(65_536):
            r, c = region_row[part], column[part]
            cosine = (region_features[r] * text_features[pairs[r, c]]).sum(-1)
            query[r, c] += (scorer.logit_scale * cosine + scorer.logit_bias) / len(scorers)
    query[pairs < 0] = torch.nan
    return ReferLogits(query, aux, torch.from_numpy(group), expression_group, slot, noun_parser)
