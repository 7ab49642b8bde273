"""How unlike the similarities of different regions are: shares of variance, hubs, and what kind of region is one."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import skew
from torch import Tensor

from .datasets import XYWH, ReferDataset
from .normalization import calibrated_weight, pool
from .regions import box_iou

OBJECT, LOOSE, GROUND = "object", "part or loose box", "bare ground"  # kinds of candidate, by IoU with the objects


def sums_of_squares(logits: Tensor, image: Tensor) -> pd.DataFrame:
    """Return what the region alone and its interaction with texts add to the variance of logits [C, T]: a row a candidate.

    logit = effect of the text in its image + region + interaction (Scheffé, The Analysis of Variance, 1959, §4.2): the
    first cannot change what is picked; region effects are about the mean of their image [C].

    >>> sums_of_squares(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0, 0]))
       region  interaction
    0     4.5          0.5
    1     4.5          0.5
    """
    region, both = torch.zeros(2, len(logits), dtype=torch.float64)
    for columns in logits.split(max(2**22 // len(logits), 1), 1):  # bounded memory
        values = columns.double()
        total = values.new_zeros(int(image.max()) + 1, values.shape[1]).index_add(0, image, values)
        values = values - (total / image.bincount()[:, None])[image]
        region += values.sum(1)
        both += values.square().sum(1)
    region = region.square() / logits.shape[1]
    return pd.DataFrame({"region": region.numpy(), "interaction": (both - region).numpy()})


def region_share(logits: Tensor, image: Tensor) -> float:
    """Return the share of the variance among competing candidates that belongs to the candidate alone, in 0 … 1.

    `logits` [C, T] of texts that need no labels and do not belong to the candidates; those with the same number in `image`
    [C] compete, at a fixed text (in a gallery all: zeros). NaN where none compete.

    >>> region_share(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0, 0]))
    0.9
    """
    region, interaction = sums_of_squares(logits, image).sum()
    return region / (region + interaction) if region + interaction else np.nan


def diagnosis(logits: Tensor, a: Tensor, image: Tensor, temperature: float = 1.0) -> pd.Series:
    """Return what a bank `a` [C, M] can do for scores like `logits` [C, T], without labels.

    region_share: how much there is to take off; agreement: how much of the candidates' mean logits the bank's pool
    sees (squared correlation among competing candidates); weight: w* of `calibrated_weight`.
    """
    pooled, mean = pool(a, temperature), logits.double().mean(1)
    weight, reverse = calibrated_weight(pooled, mean, image), calibrated_weight(mean, pooled, image)
    return pd.Series({"region_share": region_share(logits, image), "agreement": weight * reverse, "weight": weight})


def k_occurrence(scores: Tensor, k: int = 1) -> Tensor:
    """Return for how many texts an image of a gallery is among the k highest, [N, T] -> [N] (Radovanović et al. 2010).

    >>> k_occurrence(torch.tensor([[3.0, 3.0, 1.0], [2.0, 1.0, 2.0], [1.0, 2.0, 0.0]]))
    tensor([2, 1, 0])
    """
    return scores.topk(min(k, len(scores)), 0).indices.flatten().bincount(minlength=len(scores))


def gini(counts: np.ndarray | Tensor) -> Any:
    """Return Σ|N_i − N_j| / (2 n Σ N) along the last axis: 0 where all are picked alike, towards 1 where one takes all."""
    ordered = np.sort(np.asarray(counts, np.float64))
    ranks = 2 * np.arange(1, ordered.shape[-1] + 1) - ordered.shape[-1] - 1
    with np.errstate(invalid="ignore"):  # NaN where nothing is picked
        return ordered @ ranks / (ordered.shape[-1] * ordered.sum(-1))


def hub_table(counts: pd.DataFrame, clusters: np.ndarray, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return how unevenly images are retrieved, from `k_occurrence` counts: a row an image, a column a method.

    A row a method and measure: skewness (Radovanović et al., JMLR 2010), gini, never (share of zeros). Columns method,
    measure, value, ci_low, ci_high, delta_vs_clip (to the first), delta_ci_low, delta_ci_high; intervals resample `clusters`.
    """
    measures = {"skewness": lambda part: skew(part, 1), "gini": gini, "never": lambda part: (part == 0).mean(1)}
    codes, names = pd.factorize(clusters)
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws if len(names) > 1 else 0, len(names)))
    times = [np.ones(len(names), int), *(np.bincount(row, minlength=len(names)) for row in drawn)]
    samples = (np.repeat(counts.to_numpy(), one[codes], axis=0).T for one in times)
    values = np.array([np.stack([measure(part) for measure in measures.values()], 1) for part in samples])
    table = pd.MultiIndex.from_product([counts, measures], names=["method", "measure"]).to_frame(index=False)
    for name, stem, part in (("value", "ci", values), ("delta_vs_clip", "delta_ci", values - values[:, :1])):
        flat = pd.DataFrame(part.reshape(len(part), -1))
        three = [flat.loc[0], *flat[1:].quantile([0.025, 0.975]).to_numpy()]  # without NaN, where nothing drawn varies
        table[[name, f"{stem}_low", f"{stem}_high"]] = np.stack(three, 1)
    return table


def region_traits(ds: ReferDataset, candidates: pd.DataFrame) -> pd.DataFrame:
    """Return what might make a candidate a hub, a row a candidate.

    kind: OBJECT (IoU ≥ 0.5 with one), GROUND (IoU < 0.1 with every object) or else LOOSE; framing: the highest IoU;
    category: of that object, missing if not OBJECT.
    """
    objects = ds.annotations.loc[ds.annotations["iscrowd"] == 0, ["image_id", *XYWH, "category"]]
    own = candidates[["image_id", *XYWH]].rename_axis("row").reset_index()
    both = own.merge(objects, on="image_id", suffixes=("", "_o"))
    both["iou"] = box_iou(both[XYWH].to_numpy(), both[[f"{side}_o" for side in XYWH]].to_numpy())
    best = both.loc[both.groupby("row")["iou"].idxmax()].set_index("row").reindex(range(len(candidates)))
    framing = best["iou"].fillna(0)
    category = best["category"].astype(object).where(framing >= 0.5)  # not of a closed list of names
    kind = np.select([framing >= 0.5, framing < 0.1], [OBJECT, GROUND], LOOSE)
    return pd.DataFrame({"kind": kind, "category": category, "framing": framing})
