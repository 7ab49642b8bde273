"""BSAP, BSAP-H and the training-free corrections beside them, each a line or a few on the table of pairs.

METHODS[name](s, a, pairs, **options) -> [P]: `s` [P] is CLIP's logit of each pair, `a` [C, M] the logits of every candidate
and every auxiliary prompt, `pairs` anything with integer tensors `expression` and `candidate` [P]. Higher is better.
Nearly all are one family, s − w · pool_T(a): one number taken off a region, whatever is asked (`shift_and_scale`), with
pool_T(a) = T · log(mean_m exp(a_m / T)), from the maximum (T → 0) to the mean (T = ∞).

    method           taken off a region          w    source; what it becomes as a ranking of regions
    clip             nothing                     0    Radford et al. 2021
    bsap             pool, T = 1                 1    arXiv 2402.18400
    bsap_calibrated  pool, T = 1                 w*   ours: least squares on unlabelled texts
    qb_norm          pool, T = scale / 20        1    Bogolin et al. 2022, static: inverted softmax; else `qb_norm_dynamic`
    subtraction      mean                        1    Shtedritski et al. 2023 (Red Circle)
    dn               mean                        1/2  Zhou et al. 2023; its mean image is the same for all regions
    tas              mean, image's other queries 0.7  as Suo et al. 2023, whose bank are phrases of a generated caption
    nnn              mean of the 128 largest     3/4  Chowdhury et al. 2024
    csls             mean of the 10 largest      1/2  Conneau et al. 2018, halved; its term of the text cancels
    db_norm          pools of texts and images   1    Wang et al. 2023 (DualIS): still one number a region
    sinkhorn         pool of a − potentials      1    Pan et al. 2025 without their bank of images; starts as bsap
    bsap_zscore      mean, then / deviation           ours; as mutual proximity's one-sided form under normal tails
    bsap_minmax      minimum, then / range            ours
    bsap_h           w · softmax over the candidates + (1 − w) · BSAP: arXiv 2402.18400; needs the query, so no shift

Label priors, Frolic and prompt weighting are one number a text: they cannot change a ranking of regions. GR-CLIP needs
features: `centred`. Float64 inside; a temperature is in 1e-6 … 1e6 or ∞, else a ValueError.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from .regions import Pairs


def pool(a: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T · log(mean(exp(a / T))) of each region, [C, M] -> [C] float64: BSAP's bias less T · log M.

    That constant moves BSAP's value and never a ranking; without it the pool keeps its digits at any T.

    >>> pool(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), temperature=math.inf)
    tensor([0., 2.], dtype=torch.float64)
    """
    return _pool(a.double(), temperature)


def _pool(a: Tensor, temperature: float = 1.0) -> Tensor:
    if temperature == math.inf:
        return a.mean(1)
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"temperature is {temperature}: it must lie between 1e-6 and 1e6, or be inf for the mean.")
    top = a.amax(1, keepdim=True)
    x = (a - top).div_(temperature)
    if temperature > 100:  # exp is nearly 1: only exp − 1 keeps the digits
        return top[:, 0] + temperature * x.expm1_().mean(1, dtype=torch.float64).log1p()
    return top[:, 0] + temperature * x.exp_().mean(1).double().log()


def bsap(s: Tensor, a: Tensor, pairs: Pairs, temperature: float = 1.0) -> Tensor:
    """Return BSAP, exp(s/T) / (exp(s/T) + Σ_m exp(a_m/T)), [P] in [0, 1]: to rank, METHODS["bsap"] does not saturate."""
    return _log_odds(s, a, pairs, temperature).sigmoid()


def bsap_hybrid(s: Tensor, a: Tensor, pairs: Pairs, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Return BSAP-H, weight · softmax of s over an expression's candidates + (1 − weight) · BSAP: [P] in [0, 1]."""
    return weight * candidate_softmax(s, pairs) + (1 - weight) * bsap(s, a, pairs, temperature)


def candidate_softmax(s: Tensor, pairs: Pairs, log: bool = False) -> Tensor:
    """Return the softmax of s over the candidates of each expression, or its logarithm: [P] -> [P] float64."""
    s, count = s.double(), len(pairs.expression.bincount())
    top = s.new_zeros(count).scatter_reduce(0, pairs.expression, s, "amax", include_self=False)
    shifted = s - top[pairs.expression]
    shares = shifted - s.new_zeros(count).index_add(0, pairs.expression, shifted.exp()).log()[pairs.expression]
    return shares if log else shares.exp()


def _log_odds(s: Tensor, a: Tensor, pairs: Pairs, temperature: float) -> Tensor:
    bias = pool(a, temperature) / temperature + math.log(a.shape[1])
    return s.double() / temperature - bias[pairs.candidate]


def calibrated_weight(pooled: Tensor, mean_logit: Tensor, image: Tensor) -> float:
    """Return w* = cov(pooled, mean_logit) / var(pooled) among competing candidates: least squares, without labels.

    `pooled` [C] is `pool(a)`, `mean_logit` [C] a candidate's mean logit over unlabelled texts that resemble the queries;
    candidates with the same number in `image` [C] compete (in a gallery all: zeros). 0 where no pool differs.

    >>> calibrated_weight(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0, 0, 1]))
    0.5
    """
    values = torch.stack([pooled, mean_logit], 1).double()
    total = values.new_zeros(int(image.max()) + 1, 2).index_add(0, image, values)[image]
    x, y = (values - total / image.bincount()[image][:, None]).T
    return float(x @ y / (x @ x)) if x.abs().max() > 1e-9 else 0.0


def shift_and_scale(a: Tensor, name: str = "bsap", dtype: Any = torch.float64, **options: Any) -> tuple[Tensor, Tensor]:
    """Return shift and scale of each region, [C, M] -> [C], [C]: METHODS[name] is (s − shift) / scale.

    So a correction fits into an index of vectors. Raises ValueError for "bsap_h" and "tas", which need the queries.
    """
    if name not in _CORRECTIONS:
        raise ValueError(f"{name!r} is not a shift and a scale of each region; {', '.join(_CORRECTIONS)} are.")
    result = _CORRECTIONS[name](a.to(dtype), **options)
    shift, scale = result if isinstance(result, tuple) else (result, torch.ones_like(result))
    return shift, scale.where(scale > 2e-5, 1)  # logits that differ by rounding only: such a region is just shifted


@torch.no_grad()
def shift_and_scale_from_features(
    features: Tensor, aux_features: Tensor, logit_scale: float, name: str = "bsap", block: int = 2**18, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return `shift_and_scale` of unit features, [C, D] and [M, D] -> [C], [C], holding about `block` logits at a time.

    "sinkhorn" passes over them once an iteration; "db_norm" and "bsap_calibrated", with options about all regions, hold all.
    """
    if name in ("db_norm", "bsap_calibrated"):
        return shift_and_scale(logit_scale * features @ aux_features.T, name, **options)
    parts = features.split(max(block // len(aux_features), 64))
    bank, offset = logit_scale * aux_features.T, features.new_zeros(len(aux_features))
    if name == "sinkhorn":
        offset -= prompt_potentials(lambda: (part @ bank for part in parts), **options)
        name, options = "bsap", {"temperature": options.get("temperature", 1.0)}
    result = torch.empty(2, len(features), dtype=torch.float64, device=features.device)  # pieces would fragment memory
    for part, values in zip(parts, result.split(len(parts[0]), 1), strict=True):
        values[0], values[1] = shift_and_scale(torch.addmm(offset, part, bank), name, features.dtype, **options)
    return result[0], result[1]


def prompt_potentials(blocks: Callable[[], Iterable[Tensor]], temperature: float = 1.0, iterations: int = 10) -> Tensor:
    """Return Sinkhorn's potential of each prompt, [M], from the rows of `a` [C, M], which `blocks()` yields some at a time.

    With pool_T(a − potentials) off each candidate, all use all prompts alike. T is finite.
    """
    potentials = torch.zeros(())
    for _ in range(iterations - 1):
        shares = [((a - _pool(a - potentials, temperature)[:, None]) / temperature).logsumexp(0) for a in blocks()]
        total = torch.stack(shares).logsumexp(0)
        potentials = temperature * (total - total.mean())
    return potentials


def centred(features: Tensor, mean: Tensor) -> Tensor:
    """Return unit features [N, D] less their modality's mean [D], units again: GR-CLIP (arXiv 2507.19054)."""
    return normalize(features - mean, dim=-1)


def qb_norm_dynamic(scores: Tensor, a: Tensor, temperature: float = 5.0) -> Tensor:
    """Return a gallery's scores [N, T] corrected by its bank's [N, M] where a text's best image is a prompt's best too."""
    corrected = torch.isin(scores.argmax(0), a.argmax(0))
    return scores - pool(a, temperature)[:, None] * corrected


def _dual(a: Tensor, image_logits: Tensor, temperature: float = 2.0, image_temperature: float = 100.0) -> Tensor:
    """T = scale / β: Pan et al.'s β of 50 and 1 for CLIP, at its scale of 100 (that of `image_logits` [C, K] too)."""
    texts, images = _pool(a, temperature), pool(image_logits, image_temperature)
    return (image_temperature * texts + temperature * images) / (temperature + image_temperature)


_CORRECTIONS: dict[str, Callable[..., Any]] = {
    "clip": lambda a: a.new_zeros(len(a)),
    "bsap": _pool,
    "bsap_minmax": lambda a: (a.amin(1), a.amax(1) - a.amin(1)),
    "bsap_zscore": lambda a: (a.mean(1), a.std(1, correction=0)),
    "subtraction": lambda a, weight=1.0: weight * a.mean(1),
    "dn": lambda a, weight=0.5: weight * a.mean(1),
    "nnn": lambda a, k=128, weight=0.75: weight * a.topk(min(k, a.shape[1])).values.mean(1),
    "csls": lambda a, k=10, weight=0.5: weight * a.topk(min(k, a.shape[1])).values.mean(1),
    "qb_norm": lambda a, temperature=5.0: _pool(a, temperature),  # the source's β = 20 at CLIP's scale of 100
    "bsap_calibrated": lambda a, mean_logit, image, temperature=1.0: (
        calibrated_weight(pooled := _pool(a, temperature), mean_logit, image) * pooled
    ),
    "sinkhorn": lambda a, **how: _pool(a - prompt_potentials(lambda: [a], **how), how.get("temperature", 1.0)),
    "db_norm": _dual,
}


def _corrected(name: str, s: Tensor, a: Tensor, pairs: Pairs, **options: Any) -> Tensor:
    shift, scale = shift_and_scale(a, name, **options)
    return (s.double() - shift[pairs.candidate]) / scale[pairs.candidate]


def _bsap_h(s: Tensor, a: Tensor, pairs: Pairs, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Log-odds of BSAP-H, from logarithms: weight 0 ranks as BSAP and 1 as CLIP even where h rounds to 0 or 1."""
    log_share, log_odds = candidate_softmax(s, pairs, log=True), _log_odds(s, a, pairs, temperature)
    log_weight, log_rest = (math.log(w) if w else -math.inf for w in (weight, 1 - weight))
    # only one candidate can hold nearly all of the softmax, so keeping 1 − softmax off 0 ties nothing
    log_others = (-log_share.exp().clamp(max=1 - 1e-16)).log1p()
    log_h = torch.logaddexp(log_weight + log_share, log_rest + logsigmoid(log_odds))
    return log_h - torch.logaddexp(log_weight + log_others, log_rest + logsigmoid(-log_odds))


def _tas(s: Tensor, a: Tensor, pairs: Pairs, weight: float = 0.7) -> Tensor:
    total = s.new_zeros(len(a), dtype=torch.float64).index_add(0, pairs.candidate, s.double())[pairs.candidate]
    others = pairs.candidate.bincount(minlength=len(a))[pairs.candidate] - 1
    return s - weight * (total - s) / others.clamp(min=1)


METHODS: dict[str, Callable[..., Tensor]] = {name: partial(_corrected, name) for name in _CORRECTIONS}
METHODS |= {"bsap_h": _bsap_h, "tas": _tas}
