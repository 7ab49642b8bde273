"""BSAP inside a vector index: what is one shift and one scale an image costs nothing at query time.

METHODS gives an image f the score (τ · f·g − shift) / scale for a text g, and that is the inner product of
[f / scale, −shift / scale] with [τ·g, 1]: any index of inner products, here FAISS's, ranks as the method does.
"""

from __future__ import annotations

import base64
import glob
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from . import __version__
from .normalization import METHODS, bsap, bsap_hybrid, default_options, shift_and_scale_from_features

ROWS = 2**16  # images corrected and added at a time


class IndexFileError(RuntimeError):
    """A saved index that cannot be used: missing, damaged, or built from other settings. The message says what to do."""


class BalancedIndex:
    """A FAISS index that ranks images as a method of `normalization.METHODS` does. `index` is FAISS's own, e.g. to set nprobe.

    `build` makes one from images, `load` from a file; both end here, with the bank's `aux_features` [M, D], FAISS's string
    `factory` and the method's `options`.

    >>> images, prompts = torch.eye(3), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.6, 0.8]])
    >>> balanced = BalancedIndex.build(images, prompts, logit_scale=10.0)
    >>> scores, ids = balanced.search(torch.tensor([[0.6, 0.8, 0.0]]), k=2)  # image 1 is near to every prompt
    >>> ids, balanced.search(torch.tensor([[0.6, 0.8, 0.0]]), k=2, probability=True)[0]
    (tensor([[0, 1]]), tensor([[0.9951, 0.1173]]))
    """

    def __init__(self, aux_features: Tensor | np.ndarray, logit_scale: float, method: str, factory: str, options: dict):
        """Hold settings without any image yet: use `build` or `load`."""
        known = default_options(method)
        if unknown := options.keys() - known.keys():
            raise ValueError(
                f"{method} has no {', '.join(sorted(unknown))}; its options: {', '.join(known) or 'none'}."
            )
        self.aux_features = _floats(aux_features, "aux_features")
        self.settings: dict[str, Any] = {"method": method, "logit_scale": float(logit_scale), **known, **options}
        self.factory = factory
        dimension = self.aux_features.shape[1]
        room_for_bias, width = _with_bias(factory, dimension)
        self.index: Any = faiss.index_factory(width, room_for_bias, faiss.METRIC_INNER_PRODUCT)
        if method == "bsap_h" and (inverted := faiss.try_extract_index_ivf(self.index)):
            inverted.make_direct_map()  # its re-ranking reads vectors back
        # stored is gain · [f / scale, (offset − shift / scale) / unit], searched [τ·g, unit] / gain; "Flat" needs none of it
        self.offset, self.unit, self.gain = 0.0, 1.0, 1.0
        self.largest = [0.0, 0.0]  # norm of f / scale and size of the rest, for the error of float32

    @classmethod
    def build(
        cls,
        image_features: Tensor | np.ndarray,
        aux_features: Tensor | np.ndarray,
        logit_scale: float,
        temperature: float | None = None,
        method: str = "bsap",
        factory: str = "Flat",
        **options: float,
    ) -> BalancedIndex:
        """Return an index of `image_features` [N, D] that ranks as METHODS[`method`] with `aux_features` [M, D].

        Features are CLIP's unit vectors (or their mean over several visual prompts); `logit_scale` has its exp taken.
        `temperature` (None: the method's own) and `options` are those of METHODS. Ids are rows, in the order of adding. Shift
        and scale are found in blocks, so memory is that of features and index. `factory` is FAISS's string; "Flat" ranks
        exactly (`search`). For others the extra coordinate is centred and brought to the size of the rest, and a product
        quantizer PQm becomes PQ(m+1), one byte an image more, whose last part is the bias alone. They are trained on a
        random sample (seed 0).

        BSAP-H is no number of an image: its softmax is over the images that are asked. For it, the index is BSAP's, whose
        best 10·k (at least 1,000) are joined with CLIP's, from the same index, and re-ranked; the softmax is over these.

        Raises ValueError on what does not fit and on features that are NaN or infinite.
        """
        given = options if temperature is None else {**options, "temperature": temperature}
        balanced = cls(aux_features, logit_scale, method, factory, given)
        if factory != "Flat":
            if not len(image_features):
                raise ValueError(f"image_features has no image, and {factory} must be trained on some.")
            lists = re.search(r"IVF(\d+)", factory)
            most = max(ROWS, 64 * int(lists[1]) if lists else 0)
            chosen = np.sort(np.random.default_rng(0).permutation(len(image_features))[:most])
            vectors, dimension = balanced._vectors(image_features[chosen]), balanced.aux_features.shape[1]
            rest, bias = vectors[:, :dimension], vectors[:, dimension]
            norm, spread = float(np.linalg.norm(rest, axis=1).mean()), float(bias.std())
            balanced.offset, balanced.gain = -float(bias.mean()), 1 / norm if norm else 1.0
            if spread * balanced.gain > 1e-6:
                # measured (tests/benchmarks/retrieval.py): a bias as spread as the other coordinates, or more, coarsens the
                # cells of IVF; a quarter of that is as good as less
                balanced.unit = 4 * spread * balanced.gain * math.sqrt(dimension)
            balanced.index.train(balanced._vectors(image_features[chosen]))
        balanced.add(image_features)
        return balanced

    def __len__(self) -> int:
        return self.index.ntotal

    def add(self, image_features: Tensor | np.ndarray) -> None:
        """Add images [N, D], corrected with the settings of `build`; their ids go on from the last."""
        dimension = self.aux_features.shape[1]
        for start in range(0, len(image_features), ROWS):  # so that an array on disk is read in pieces
            vectors = self._vectors(image_features[start : start + ROWS])
            norm = float(np.linalg.norm(vectors[:, :dimension], axis=1).max())
            bias = float(np.abs(vectors[:, dimension]).max())
            self.largest = [max(pair) for pair in zip(self.largest, (norm, bias), strict=True)]
            self.index.add(vectors)

    def search(self, text_features: Tensor | np.ndarray, k: int, probability: bool = False) -> tuple[Tensor, Tensor]:
        """Return scores and ids of the `k` best images (all, where there are fewer) for each text, [T, D] -> [T, k] and [T, k].

        Scores are METHODS' (with `probability` the values of BSAP or BSAP-H, in 0..1), best first; of equal ones the lower
        id is first. On "Flat" that is exact, though FAISS adds up in float32: it is asked for more than k, their products
        are taken again in float64 and rounded to float32, and it is asked for yet more while its own error could hide an image
        of the best k. So the order is that of the vectors stored, float32 themselves: two images can change places with
        METHODS on float64 features only if their scores agree to about seven digits. Other factories may find fewer: id −1.
        Raises ValueError for no image, k < 1, and probabilities of a method that has none.
        """
        texts = _floats(text_features, "text_features", self.aux_features.shape[1]).numpy()
        method = self.settings["method"]
        if probability and method not in ("bsap", "bsap_h"):
            raise ValueError(f"The scores of {method} are no probabilities: only bsap and bsap_h have them.")
        if k < 1 or not len(self):
            raise ValueError(f"k is {k}, of {len(self)} images: at least one of each is needed.")
        queries = np.zeros((len(texts), self.index.d))
        queries[:, : texts.shape[1]] = texts * np.float64(self.settings["logit_scale"])
        queries[:, texts.shape[1]] = self.unit
        queries /= self.gain
        if method == "bsap_h":
            return self._hybrid(queries, min(k, len(self)), probability)
        scores, ids = (torch.from_numpy(part) for part in self._nearest(queries, min(k, len(self))))
        if probability:  # the score lacks the bias's constant T · log M: as if that were the only auxiliary logit
            temperature = self.settings["temperature"]
            constant = torch.full((len(scores), 1), temperature * math.log(len(self.aux_features)))
            scores = bsap(scores, constant, temperature)
        return scores, ids

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k highest scores and their ids, [T, width] float64 -> [T, k] float32 and [T, k]; of equals the lower id."""
        if self.factory != "Flat":
            scores, ids = self.index.search(queries.astype(np.float32), k)
            order = np.lexsort((ids, -scores))
            return tuple(np.take_along_axis(part, order, 1) for part in (scores - np.float32(self.offset), ids))  # type: ignore[return-value]
        scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        length = np.linalg.norm(queries[:, : self.aux_features.shape[1]], axis=1) * self.largest[0] + self.largest[1]
        slack = (self.index.d + 4) * 2.0**-24 * length  # of a float32 sum of products in any order (Higham 2002, §3.1)
        waiting, more = np.arange(len(queries)), 2 * k + 16
        while len(waiting):
            more = min(more, len(self))
            rows = max(2**22 // (more * self.index.d), 1)
            left = []
            for part in np.split(waiting, range(rows, len(waiting), rows)):
                rough, found = self.index.search(queries[part].astype(np.float32), more)
                vectors = self.index.reconstruct_batch(found.ravel()).reshape(*found.shape, -1)
                exact = np.einsum("tkd,td->tk", vectors, queries[part]).astype(np.float32)
                order = np.lexsort((found, -exact))[:, :k]
                scores[part], ids[part] = (np.take_along_axis(values, order, 1) for values in (exact, found))
                if more < len(self):
                    left.append(part[scores[part, -1] <= rough[:, -1] + slack[part]])
            waiting, more = np.concatenate([waiting[:0], *left]), 4 * more
        return scores, ids

    def _hybrid(self, queries: np.ndarray, k: int, probability: bool) -> tuple[Tensor, Tensor]:
        """Re-rank the best of BSAP and of CLIP by BSAP-H: [T, k] and [T, k]."""
        depth, dimension = min(max(10 * k, 1000), len(self)), self.aux_features.shape[1]
        plain = queries * (np.arange(self.index.d) != dimension)  # without the bias it is CLIP
        found = np.concatenate([self._nearest(asked, depth)[1] for asked in (queries, plain)], 1)
        text = np.broadcast_to(np.arange(len(found))[:, None], found.shape)
        text, ids = np.unique(np.stack([text, found], 2)[found >= 0], axis=0).T
        vectors = self.index.reconstruct_batch(ids)
        logits = torch.from_numpy(np.einsum("rd,rd->r", vectors, plain[text]))[:, None]
        temperature, weight = self.settings["temperature"], self.settings["weight"]
        # a region's only auxiliary prompt, with the bias of all M, gives the same b
        bias = self.offset - vectors[:, [dimension]].astype(np.float64) * (self.unit / self.gain)
        bias = torch.from_numpy(bias + temperature * math.log(len(self.aux_features)))
        hybrid = bsap_hybrid if probability else METHODS["bsap_h"]
        value = hybrid(logits, bias, torch.from_numpy(text), weight, temperature)[:, 0].float()
        order = np.lexsort((ids, -value.numpy(), text))
        place = np.arange(len(text)) - np.searchsorted(text, text)
        scores, best = torch.full((len(found), k), -torch.inf), torch.full((len(found), k), -1)
        kept = place < k
        scores[text[kept], place[kept]] = value[order][kept]
        best[text[kept], place[kept]] = torch.from_numpy(ids[order][kept])
        return scores, best

    def _vectors(self, image_features: Tensor | np.ndarray) -> np.ndarray:
        """Return what the index stores of images, [N, D] -> [N, width]: f / scale, the extra coordinate, zeros."""
        features = _floats(image_features, "image_features", self.aux_features.shape[1])
        settings = dict(self.settings)
        method, logit_scale = settings.pop("method"), settings.pop("logit_scale")
        if method == "bsap_h":
            method, _ = "bsap", settings.pop("weight")
        shift, scale = shift_and_scale_from_features(features, self.aux_features, logit_scale, method, **settings)
        vectors = np.zeros((len(features), self.index.d), np.float32)
        vectors[:, : features.shape[1]] = features / scale[:, None]
        vectors[:, features.shape[1]] = (self.offset - shift / scale) / self.unit
        vectors *= self.gain
        if not np.isfinite(vectors).all():
            raise ValueError(f"image_features {list(features.shape)} has NaN or infinite values.")
        return vectors

    def save(self, path: Path | str) -> None:
        """Write the settings to `path` (a .json) and the index beside it, to NAME-DIGEST.faiss.

        The settings name the index file and its SHA-256 and are written last: whenever this is interrupted, `path` still is
        the index that it was before. The index file that it had then is removed at the end.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.stem}.part")
        faiss.write_index(self.index, str(unfinished))
        digest = _sha256(unfinished)
        file = path.with_name(f"{path.stem}-{digest[:12]}.faiss")
        unfinished.replace(file)
        aux = self.aux_features.numpy()
        written = {
            **self.settings,
            "factory": self.factory,
            "dimension": aux.shape[1],
            "count": len(self),
            "offset": self.offset,
            "unit": self.unit,
            "gain": self.gain,
            "largest": self.largest,
            "file": file.name,
            "sha256": digest,
            "aux_sha256": hashlib.sha256(aux.tobytes()).hexdigest(),
            "aux_features": base64.b64encode(aux.tobytes()).decode(),  # float32, for `add`
            "versions": {"bsap-utils": __version__, "faiss": faiss.__version__},
        }
        unfinished.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
        for old in path.parent.glob(f"{glob.escape(path.stem)}-{'[0-9a-f]' * 12}.faiss"):
            if old != file:
                old.unlink()

    @classmethod
    def load(cls, path: Path | str, **expected: Any) -> BalancedIndex:
        """Return a saved index. What is `expected` of `build`'s settings must be what it was built from.

        `BalancedIndex.load("gallery.json", aux_features=…, logit_scale=100.0, method="bsap", temperature=1.0)` raises
        IndexFileError where any of these differs (auxiliary features by more than 1e-3, since another machine's rounding is
        no other bank), and where a file is missing or damaged.
        """
        path = Path(path)
        remedy = "Copy both files from where it was built, or build it anew and save it."
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            file = path.with_name(written.pop("file"))
            if _sha256(file) != written["sha256"]:
                raise IndexFileError(f"{file} is damaged: its SHA-256 is not the one in {path.name}. {remedy}")
            aux_bytes = base64.b64decode(written["aux_features"], validate=True)
            if hashlib.sha256(aux_bytes).hexdigest() != written["aux_sha256"]:
                raise ValueError("aux_features is not what was written")
            aux = np.frombuffer(aux_bytes, np.float32).reshape(-1, written["dimension"])
            options = {name: written[name] for name in default_options(written["method"])}
            balanced = cls(aux, written["logit_scale"], written["method"], written["factory"], options)
            balanced.index = faiss.read_index(str(file))
            for name in ("offset", "unit", "gain", "largest"):
                setattr(balanced, name, written[name])
        except FileNotFoundError as error:
            raise IndexFileError(f"{error.filename} is missing. {remedy}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IndexFileError(f"{path} is damaged ({type(error).__name__}: {error}). {remedy}") from error
        for name, value in expected.items():
            if name == "aux_features":
                same = np.shape(value) == aux.shape and np.allclose(value, aux, rtol=0, atol=1e-3)
            else:
                same = {**balanced.settings, "factory": balanced.factory}.get(name) == value
            if not same:
                found = "others" if name == "aux_features" else written.get(name, "none")
                raise IndexFileError(f"{path} was built from another {name}: {found}. Load it with that, or build an index "
                                     "from yours.")  # fmt: skip
        return balanced


def synthetic_features(features: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return `count` unit vectors like those of `features` [R, D]: mixtures of two of them and a little noise, by `seed`.

    So their biases are distributed much as those of `features`, at any size: for measuring an index, not a method.

    >>> synthetic_features(torch.eye(4), 1000).shape
    torch.Size([1000, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(len(features), (2, count), generator=generator)
    mixed = torch.randn(count, features.shape[1], generator=generator).mul_(0.4 / math.sqrt(features.shape[1]))
    share = torch.rand(count, 1, generator=generator)
    mixed.addcmul_(features[first], share).addcmul_(features[second], 1 - share)
    return torch.nn.functional.normalize(mixed, dim=1, out=mixed)


def _with_bias(factory: str, dimension: int) -> tuple[str, int]:
    """Return factory and width with room for the extra coordinate: a product quantizer gets a part more, for it alone.

    >>> _with_bias("Flat", 64), _with_bias("IVF256,PQ16", 64), _with_bias("OPQ16_64,IVF256,PQ16", 64)
    (('Flat', 65), ('IVF256,PQ17', 68), ('OPQ16_64,IVF256,PQ16', 65))
    """
    quantizer = re.search(r"PQ(\d+)", factory)
    if not quantizer or re.search(r"OPQ\d+_|PCA", factory):  # a linear map brings it to a width of its own
        # a matrix product one wider than 512 takes a quarter longer, four wider no longer; 65 is quicker than 68
        return factory, dimension + 1 if dimension < 128 else 4 * (dimension // 4 + 1)
    parts = int(quantizer[1])
    if dimension % parts:
        raise ValueError(f"{factory}: {dimension} dimensions cannot be cut into {parts} equal parts.")
    return re.sub(r"PQ\d+", f"PQ{parts + 1}", factory), dimension + dimension // parts


def _floats(features: Tensor | np.ndarray, name: str, dimension: int | None = None) -> Tensor:
    """Return features as a float32 matrix on the CPU, or say what does not fit."""
    if len(features.shape) != 2 or dimension not in (None, features.shape[1]):
        raise ValueError(f"{name} {list(features.shape)}: a matrix [rows, {dimension or 'dimensions'}] is needed.")
    tensor = torch.tensor(features) if isinstance(features, np.ndarray) else features.detach()  # may be read-only
    return tensor.to("cpu", torch.float32).contiguous()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
