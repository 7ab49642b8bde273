"""BSAP inside a vector index: a correction of one shift and one scale an image costs nothing at query time.

METHODS give an image f the score (τ · f·g − shift) / scale for a text g: the inner product of [f / scale, −shift / scale]
with [τ·g, 1]. So any FAISS index of inner products ranks as the method does.
"""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from .datasets import reading, write_file
from .normalization import shift_and_scale_from_features


@dataclass
class BalancedIndex:
    """A FAISS index that ranks as a shift-and-scale method of METHODS. `index` is FAISS's own, e.g. to set nprobe.

    Stored are [f / scale / units[0], (bias − centre) / units[1]], of `settings`, none longer than its `largest`.

    >>> bank = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.6, 0.8]])
    >>> balanced = BalancedIndex.build(torch.eye(3), bank, logit_scale=10.0)
    >>> balanced.search(torch.tensor([[0.6, 0.8, 0.0]]), k=2)[1]  # image 1 is near to every prompt
    tensor([[0, 1]])
    """

    index: Any
    aux_features: Tensor
    settings: dict[str, Any]

    @classmethod
    def build(cls, image_features: Tensor, aux_features: Tensor, logit_scale: float, method: str = "bsap",
              factory: str = "Flat", **options: Any) -> "BalancedIndex":  # fmt: skip
        """Return an index of images [N, D] that ranks as METHODS[`method`] with the bank [M, D]; ids are row numbers.

        `logit_scale` has its exp taken, `options` are the method's, `factory` is FAISS's string; "Flat" is exact. ValueError
        on what does not fit, on NaN, and on factories that rescale, centre, turn or cut vectors: that changes ranks.
        """
        aux, scale = _matrix(aux_features, "aux_features"), _matrix(torch.tensor([[logit_scale]]), "logit_scale").item()
        index = faiss.index_factory(*_layout(factory, aux.shape[1]), faiss.METRIC_INNER_PRODUCT)
        settings = {"method": method, "logit_scale": scale, "factory": factory, "options": options}
        balanced = cls(index, aux, settings | {"units": (1.0, 1.0), "centre": 0.0, "largest": 0.0})
        balanced.add(image_features)
        return balanced

    def add(self, image_features: Tensor) -> None:
        """Add images [N, D]; ids go on from the last. ValueError where a shift depends on the whole gallery."""
        images, own = _matrix(image_features, "image_features", self.aux_features.shape[1]), self.settings
        if own["method"] in ("sinkhorn", "bsap_calibrated", "db_norm") and self.index.ntotal:
            raise ValueError(f"{own['method']} depends on the whole gallery: build an index of all images anew.")
        given = images, self.aux_features, own["logit_scale"], own["method"]
        shift, scale = shift_and_scale_from_features(*given, **own["options"])
        bias, sample = -shift / scale, torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: 2**18]
        if not self.index.ntotal and len(images):
            # a bias as spread as another coordinate coarsens the cells of IVF; a quarter is as good as less (benchmark)
            spread = (4 * bias.std(correction=0) * images.shape[1] ** 0.5).clamp(min=1e-3)
            sizes = (images[sample] / scale[sample, None]).norm(dim=1).mean(), spread
            own["units"] = tuple(float(size.log2().round().exp2()) for size in sizes)  # powers of 2 round nothing
            own["centre"] = float(bias.mean().round())
        for rows in [sample] * (not self.index.is_trained) + list(torch.arange(len(images)).split(2**16)):
            vectors = np.zeros((len(rows), self.index.d), np.float32)
            vectors[:, : images.shape[1]] = images[rows] / (own["units"][0] * scale[rows, None])
            vectors[:, images.shape[1]] = (bias[rows] - own["centre"]) / own["units"][1]
            own["largest"] = max(own["largest"], float(np.linalg.norm(vectors, axis=1).max(initial=0)))
            self.index.add(vectors) if self.index.is_trained else self.index.train(vectors)

    def search(self, text_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return scores (METHODS') and ids of the `k` best images, or of all, for texts [T, D] -> [T, k], [T, k].

        Best first, of equal scores the lower id; on "Flat" exactly, as the stored float32 vectors have it. Other factories
        may find fewer: id −1. ValueError on NaN or infinite texts, k < 1 and an empty index.
        """
        texts, count = _matrix(text_features, "text_features", self.aux_features.shape[1]), self.index.ntotal
        if k < 1 or not count:
            raise ValueError(f"k is {k}, of {count} images: at least one of each is needed.")
        queries, k = np.zeros((len(texts), self.index.d)), min(int(k), count)
        unit, queries[:, texts.shape[1]] = self.settings["units"]
        queries[:, : texts.shape[1]] = texts.double() * (self.settings["logit_scale"] * unit)
        parts = np.array_split(queries, queries.size * (2 * k + 16) // 2**22 + 1)  # bounded memory
        found = [self._nearest(part, k, 2 * k + 16) for part in parts]
        scores, ids = (torch.from_numpy(np.concatenate(part)) for part in zip(*found, strict=True))
        return scores, ids

    def _nearest(self, queries: np.ndarray, k: int, asked: int) -> tuple[np.ndarray, np.ndarray]:
        """FAISS adds up in float32: ask for more, multiply in float64, and ask on while its error could hide an image."""
        asked = min(asked, self.index.ntotal) if self.settings["factory"] == "Flat" else k
        rough, ids = self.index.search(queries.astype(np.float32), asked)
        scores, centre, width = rough, self.settings["centre"], self.index.d
        if self.settings["factory"] == "Flat":
            vectors = self.index.reconstruct_batch(ids.ravel()).reshape(*ids.shape, width)
            scores = np.einsum("tkd,td->tk", vectors, queries)
        scores = (scores + centre).astype(np.float32)
        order = np.lexsort((ids, -scores))[:, :k]
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        error = (width + 4) * 2.0**-24 * self.settings["largest"] * np.linalg.norm(queries, axis=1)  # Higham 2002, §3.1
        unsure = (scores[:, -1] <= rough[:, -1] + centre + error) & (k < asked < self.index.ntotal)
        for row in np.flatnonzero(unsure):
            scores[[row]], ids[[row]] = self._nearest(queries[[row]], k, 8 * asked)
        return scores, ids

    def save(self, path: Path | str) -> None:
        """Write index, bank and settings to one file, whole or not at all."""
        content = vars(self) | {"index": torch.from_numpy(faiss.serialize_index(self.index))}
        write_file(path, lambda part: torch.save(content, part))

    @classmethod
    def load(cls, path: Path | str) -> "BalancedIndex":
        """Return a saved index. DatasetError where the file is missing or damaged."""
        with reading(path, "an index that was saved whole, or build it anew"):
            if damaged := zipfile.ZipFile(path).testzip():
                raise ValueError(f"its part {damaged} is not as it was written")
            content = torch.load(path, weights_only=True)
            index = faiss.deserialize_index(content["index"].numpy())
            return cls(index, content["aux_features"], content["settings"])


def _layout(factory: str, dimension: int) -> tuple[int, str]:
    """Return width and factory with room for the extra coordinate: in a product quantizer a part more, for it alone."""
    if re.search(r"(?i)L2norm|PCA|ITQ|RR\d|OPQ", factory):  # which turns: the bias would share all parts' errors
        raise ValueError(f"factory {factory!r} scales, centres, turns or cuts vectors, which changes ranks: drop it.")
    if parts := re.search(r"PQ(\d+)", factory):
        return dimension + dimension // int(parts[1]), factory.replace(parts[0], f"PQ{int(parts[1]) + 1}", 1)
    return dimension + 1 if dimension < 128 else 4 * (dimension // 4 + 1), factory  # BLAS likes 516, not 513


def _matrix(features: Tensor | np.ndarray, name: str, dimension: int | None = None) -> Tensor:
    """Return features as a float32 matrix on the CPU. ValueError on another shape, NaN or infinite values."""
    tensor = torch.as_tensor(features).detach().to("cpu", torch.float32)
    if tensor.ndim != 2 or dimension not in (None, tensor.shape[1]) or not tensor.sum(dtype=torch.float64).isfinite():
        raise ValueError(f"{name} {list(tensor.shape)}: [rows, {dimension or 'D'}] without NaN or inf is needed.")
    return tensor
