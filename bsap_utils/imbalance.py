"""How unlike the similarities of different regions are: shares of variance, hubs, and what kind of region is one."""

import numpy as np
import pandas as pd
import torch
from scipy.stats import skew
from torch import Tensor

from .datasets import XYWH, ReferDataset
from .normalization import calibrated_weight, pool
from .regions import box_iou
from .stats import cluster_bootstrap

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
    count = image.bincount()[:, None]

    def about_image(values: Tensor) -> Tensor:
        total = values.new_zeros(len(count), values.shape[1]).index_add(0, image, values)
        return values - (total / count.clamp(min=1))[image]

    region = about_image(logits.double().mean(1, keepdim=True))
    interaction = torch.zeros(len(logits), dtype=torch.float64)
    for columns in logits.split(max(2**22 // len(logits), 1), 1):  # bounded memory
        interaction += (about_image(columns.double()) - region).square().sum(1)
    return pd.DataFrame({"region": logits.shape[1] * region[:, 0].square().numpy(), "interaction": interaction.numpy()})


def region_share(logits: Tensor, image: Tensor) -> float:
    """Return the share of the variance among competing candidates that belongs to the candidate alone, in 0 … 1.

    `logits` [C, T] of texts that need no labels and do not belong to the candidates; those with the same number in `image`
    [C] compete, at a fixed text (in a gallery all: zeros). NaN where none compete.

    >>> region_share(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0, 0]))
    0.9
    """
    region, interaction = sums_of_squares(logits, image).sum()
    return region / (region + interaction) if region + interaction else np.nan


def variance_shares(logits: Tensor, image: Tensor, seed: int = 0) -> pd.Series:
    """Return the shares region (`region_share`) and interaction, and region_low and region_high (95 %, over images)."""
    sums = sums_of_squares(logits, image).assign(text=np.nan)  # the text's effect is left out
    total = sums.sum(axis=1).to_numpy()[:, None]
    low, high = cluster_bootstrap(sums[["region"]].to_numpy(), image.numpy(), total, seed=seed)
    shares = sums.sum(min_count=1) / total.sum()
    return pd.concat([shares, pd.Series({"region_low": low[0], "region_high": high[0]})])


def diagnosis(logits: Tensor, a: Tensor, image: Tensor, temperature: float = 1.0) -> pd.Series:
    """Return what a bank `a` [C, M] can do for scores like `logits` [C, T], without labels.

    region_share: how much there is to take off; agreement: how much of the candidates' mean logits the bank's pool
    sees (squared correlation among competing candidates); weight: w* of `calibrated_weight`.
    """
    pooled, mean = pool(a, temperature), logits.double().mean(1)
    weight, reverse = calibrated_weight(pooled, mean, image), calibrated_weight(mean, pooled, image)
    numbers = {"region_share": region_share(logits, image), "agreement": weight * reverse, "weight": weight}
    return pd.Series(numbers)


def k_occurrence(scores: Tensor, k: int = 1) -> Tensor:
    """Return for how many texts an image of a gallery is among the k highest, [N, T] -> [N] (Radovanović et al. 2010).

    >>> k_occurrence(torch.tensor([[3.0, 3.0, 1.0], [2.0, 1.0, 2.0], [1.0, 2.0, 0.0]]))
    tensor([2, 1, 0])
    """
    return scores.topk(min(k, len(scores)), 0).indices.flatten().bincount(minlength=len(scores))


def gini(counts: np.ndarray | Tensor) -> float:
    """Return Σ|N_i − N_j| / (2 n Σ N): 0 where all are picked alike, towards 1 where one takes all."""
    ordered = np.sort(np.asarray(counts, np.float64))
    ranks = 2 * np.arange(1, len(ordered) + 1) - len(ordered) - 1
    return float(ranks @ ordered / (len(ordered) * ordered.sum())) if ordered.any() else np.nan


def hub_table(counts: pd.DataFrame, clusters: np.ndarray, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return how unevenly images are retrieved, from `k_occurrence` counts: a row an image, a column a method.

    A row a method and measure: skewness (Radovanović et al., JMLR 2010), gini, never (share of zeros). Columns method,
    measure, value, ci_low, ci_high, delta_vs_clip (to the first method), delta_ci_low, delta_ci_high; intervals resample
    `clusters` [N] and keep the counts.
    """
    codes, names = pd.factorize(clusters)
    members, generator = pd.Series(codes).groupby(codes).indices, np.random.default_rng(seed)
    drawn = generator.integers(len(names), size=(draws if len(names) > 1 else 0, len(names)))
    samples = [np.arange(len(codes)), *(np.concatenate([members[code] for code in row]) for row in drawn)]
    values = np.array([[_hubness(column[rows]) for column in counts.to_numpy().T] for rows in samples])  # [draws, K, 3]
    table = pd.MultiIndex.from_product([counts, ("skewness", "gini", "never")], names=["method", "measure"]).to_frame(
        False
    )
    for name, stem, part in (("value", "ci", values), ("delta_vs_clip", "delta_ci", values - values[:, :1])):
        flat = pd.DataFrame(part.reshape(len(samples), -1))
        low, high = flat[1:].quantile([0.025, 0.975]).to_numpy()  # without NaN: a resample may lack all that varies
        table = table.assign(**{name: flat.loc[0], f"{stem}_low": low, f"{stem}_high": high})
    return table


def _hubness(counts: np.ndarray) -> list[float]:
    return [skew(counts) if np.ptp(counts) else np.nan, gini(counts), (counts == 0).mean()]


def region_traits(ds: ReferDataset, candidates: pd.DataFrame) -> pd.DataFrame:
    """Return what might make a candidate a hub, a row a candidate.

    kind: OBJECT (IoU ≥ 0.5 with one), GROUND (IoU < 0.1 with every object) or else LOOSE; framing: the highest IoU;
    category: of that object, missing if not OBJECT.
    """
    objects = ds.annotations.loc[ds.annotations["iscrowd"] == 0, ["image_id", *XYWH, "category"]]
    own = candidates[["image_id", *XYWH]].rename_axis("row").reset_index()
    both = own.merge(objects, on="image_id", suffixes=("", "_o"))
    both["iou"] = box_iou(both[XYWH].to_numpy(), both[[f"{side}_o" for side in XYWH]].to_numpy())
    best = both.sort_values("iou", ascending=False, kind="stable").drop_duplicates("row").set_index("row")
    best = best.reindex(np.arange(len(candidates)))
    framing = best["iou"].fillna(0).to_numpy()
    kind = np.select([framing >= 0.5, framing < 0.1], [OBJECT, GROUND], LOOSE)
    category = best["category"].where(framing >= 0.5, None).to_numpy()
    return pd.DataFrame({"kind": kind, "category": category, "framing": framing})
