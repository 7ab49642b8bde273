"""BSAP, BSAP-H and the training-free corrections beside them, each a line or a few on the table of pairs.

METHODS[name](s, a, pairs, **options) -> [P]: `s` [P] is CLIP's logit of every (expression, candidate), `a` [C, M] the
logits of every candidate against every auxiliary prompt, `pairs` anything with integer tensors `expression` and
`candidate` [P]. Higher is better. Nearly all are one family, s − w · pool_T(a): one number taken off a region, whatever
is asked (`shift_and_scale`), with pool_T(a) = T · log(mean_m exp(a_m / T)), from the maximum (T → 0) to the mean (T = ∞).

    method           taken off a region          w    source; what it becomes as a ranking of regions
    clip             nothing                     0    Radford et al. 2021
    bsap             pool, T = 1                 1    arXiv 2402.18400
    bsap_calibrated  pool, T = 1                 w*   ours: least squares on unlabelled texts
    qb_norm          pool, T = scale / 20        1    Bogolin et al. 2022: inverted softmax, the static form
    subtraction      mean                        1    Shtedritski et al. 2023 (Red Circle)
    dn               mean                        1/2  Zhou et al. 2023; its mean image is the same for all regions
    tas              mean, image's other queries 0.7  Suo et al. 2023; transductive: the other queries are the bank
    nnn              mean of the 128 largest     3/4  Chowdhury et al. 2024
    csls             mean of the 10 largest      1/2  Conneau et al. 2018, halved; its term of the text cancels
    db_norm          pools of texts and images   1    Wang et al. 2023 (DualIS): still one number a region
    sinkhorn         pool of a − potentials      1    Pan et al. 2025 (DBSN): a bank reweighted until its prompts are
                                                      used alike by all candidates; its first half-iteration is bsap
    bsap_zscore      mean, then / deviation           ours; as mutual proximity's one-sided form under normal tails
    bsap_minmax      minimum, then / range            ours
    bsap_h           w · softmax over the candidates + (1 − w) · BSAP: arXiv 2402.18400; needs the query, so no shift

Label priors, Frolic and prompt weighting are one number a text: they cannot change a ranking of regions. Local scaling
is a multiplicative csls. GR-CLIP needs features (`centred`), QB-Norm's dynamic form a gallery (`qb_norm_dynamic`). A bank
an image: entries of −inf in `a` are left out of pools and k largest, and a region without any is not shifted.
Computed in float64, where pools are exact at any temperature in 1e-6 … 1e6 or ∞; others are ValueErrors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

if TYPE_CHECKING:
    from .regions import Pairs

_FLAT = 1e-4  # a spread of logits below it is rounding: such a region is only shifted


def pool(a: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T · log(mean(exp(a / T))) of each region, [C, M] -> [C] float64: BSAP's bias less T · log M.

    That constant moves BSAP's value and never a ranking; without it the pool keeps its digits at any T.

    >>> pool(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), temperature=math.inf)
    tensor([0., 2.], dtype=torch.float64)
    """
    if not 1e-6 <= temperature <= 1e6 and temperature != math.inf:
        raise ValueError(f"temperature is {temperature}: it must lie between 1e-6 and 1e6, or be inf for the mean.")
    a = a.double()
    left_out = (a == -math.inf).sum(1)
    count = a.shape[1] - left_out
    if temperature == math.inf:
        return a.where(a > -math.inf, 0).sum(1) / count.clamp(min=1)
    top = a.amax(1, keepdim=True)
    above = ((a - top) / temperature).expm1().sum(1) + left_out  # exp − 1 keeps the digits where T is large
    return (top[:, 0] + temperature * (above / count).log1p()).where(count > 0, 0)


def bsap(s: Tensor, a: Tensor, pairs: Pairs, temperature: float = 1.0) -> Tensor:
    """Return BSAP, exp(s/T) / (exp(s/T) + Σ_m exp(a_m/T)), [P] in [0, 1] (arXiv 2402.18400).

    It ties where it rounds to 0 or 1: rank by METHODS["bsap"], which does not.

    >>> from types import SimpleNamespace
    >>> pairs = SimpleNamespace(expression=torch.tensor([0, 0]), candidate=torch.tensor([0, 1]))
    >>> bsap(torch.tensor([3.0, 0.0]), torch.zeros(2, 2), pairs).round(decimals=4)
    tensor([0.9094, 0.3333], dtype=torch.float64)
    """
    return _log_odds(s, a, pairs, temperature).sigmoid()


def bsap_hybrid(s: Tensor, a: Tensor, pairs: Pairs, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Return BSAP-H, weight · softmax of s over an expression's candidates + (1 − weight) · BSAP: [P] in [0, 1]."""
    return weight * candidate_softmax(s, pairs) + (1 - weight) * bsap(s, a, pairs, temperature)


def candidate_softmax(s: Tensor, pairs: Pairs) -> Tensor:
    """Return the softmax of s over the candidates of each expression, [P] -> [P] float64."""
    return _log_softmax(s, pairs).exp()


def _log_softmax(s: Tensor, pairs: Pairs) -> Tensor:
    s, count = s.double(), int(pairs.expression.max()) + 1
    top = s.new_zeros(count).scatter_reduce(0, pairs.expression, s, "amax", include_self=False)
    shifted = s - top[pairs.expression]
    return shifted - s.new_zeros(count).index_add(0, pairs.expression, shifted.exp()).log()[pairs.expression]


def _log_odds(s: Tensor, a: Tensor, pairs: Pairs, temperature: float) -> Tensor:
    bias = pool(a, temperature) / temperature + (a > -math.inf).sum(1).log()
    return s.double() / temperature - bias[pairs.candidate]


def calibrated_weight(pooled: Tensor, mean_logit: Tensor, image: Tensor) -> float:
    """Return w* = cov(pooled, mean_logit) / var(pooled) among competing candidates: least squares, without labels.

    `pooled` [C] is `pool(a)`, `mean_logit` [C] a candidate's mean logit over unlabelled texts that resemble the queries;
    candidates with the same number in `image` [C] compete (in a gallery all: zeros). 0 where no pool differs.

    >>> calibrated_weight(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0, 0, 1]))
    0.5
    """
    values = torch.stack([pooled, mean_logit], 1).double()
    total = values.new_zeros(int(image.max()) + 1, 2).index_add(0, image, values)
    x, y = (values - (total / image.bincount().clamp(min=1)[:, None])[image]).T
    return float(x @ y / (x @ x)) if x.abs().max() > 1e-9 else 0.0


def shift_and_scale(a: Tensor, name: str = "bsap", **options: Any) -> tuple[Tensor, Tensor]:
    """Return shift and scale of each region, [C, M] -> [C], [C] float64: METHODS[name] is (s − shift) / scale.

    So a correction fits into an index of vectors. `options` are those of METHODS[name]. Raises ValueError for "bsap_h"
    and "tas", which need the queries.

    >>> shift_and_scale(torch.tensor([[1.0, 3.0]]), "bsap_zscore")
    (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    if name not in _CORRECTIONS:
        raise ValueError(f"{name!r} is not a shift and a scale of each region; {', '.join(_CORRECTIONS)} are.")
    result = _CORRECTIONS[name](a, **options)
    return result if isinstance(result, tuple) else (result, torch.ones_like(result))


@torch.no_grad()
def shift_and_scale_from_features(
    features: Tensor, aux_features: Tensor, logit_scale: float, name: str = "bsap", block: int = 2**18, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return `shift_and_scale` of unit features, [C, D] and [M, D] -> [C], [C], holding about `block` logits at a time.

    For methods that look at a region alone, and for "sinkhorn", which passes over the features once an iteration; not
    for "bsap_calibrated", which is `calibrated_weight` times the shift of "bsap", nor for "db_norm".
    """
    scaled = (aux_features * logit_scale).T.contiguous()
    parts = features.split(max(block // len(aux_features), 32))
    if name == "sinkhorn":
        scaled_part = lambda part: part @ scaled  # noqa: E731
        potentials = prompt_potentials(lambda: map(scaled_part, parts), **options)
        found = [(pool(part @ scaled - potentials, options.get("temperature", 1.0)),) * 2 for part in parts]
        return torch.cat([shift for shift, _ in found]), torch.ones(len(features), dtype=torch.float64)
    found = [shift_and_scale(part @ scaled, name, **options) for part in parts]
    return torch.cat([shift for shift, _ in found]), torch.cat([scale for _, scale in found])


def prompt_potentials(blocks: Callable[[], Iterable[Tensor]], temperature: float = 1.0, iterations: int = 10) -> Tensor:
    """Return Sinkhorn's potential of each prompt, [M]: what it is preferred by beyond its share of the candidates.

    `blocks()` yields the rows of `a` [C, M] some at a time. A candidate's shift is pool_T(a − potentials): its own row is
    all it needs, so that it can be added to an index later. T must be finite.
    """
    potentials = torch.zeros(())
    for _ in range(iterations - 1):
        shares = [((a - pool(a - potentials, temperature)[:, None]) / temperature).logsumexp(0) for a in blocks()]
        total = torch.stack(shares).logsumexp(0)
        potentials = temperature * (total - total.mean())
    return potentials


def centred(features: Tensor, mean: Tensor) -> Tensor:
    """Return unit features [N, D] less their modality's mean [D], units again: GR-CLIP (arXiv 2507.19054)."""
    return normalize(features - mean, dim=-1)


def qb_norm_dynamic(scores: Tensor, a: Tensor, temperature: float = 5.0) -> Tensor:
    """Return QB-Norm's dynamic form (k = 1) for a gallery's [N, T] scores and its [N, M] bank logits: [N, T].

    Only texts whose best image is also some auxiliary prompt's best are corrected (Bogolin et al. 2022).
    """
    corrected = torch.isin(scores.argmax(0), a.argmax(0))
    return scores - pool(a, temperature)[:, None] * corrected


def default_options(name: str) -> dict[str, Any]:
    """Return the options of METHODS[name] that have defaults.

    >>> default_options("nnn"), default_options("bsap_h")
    ({'k': 128, 'weight': 0.75}, {'weight': 0.5, 'temperature': 1.0})
    """
    parameters = signature(_CORRECTIONS.get(name) or METHODS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _nearest(a: Tensor, k: int, weight: float) -> Tensor:
    return weight * pool(a.topk(min(k, a.shape[1])).values, math.inf)


def _zscore(a: Tensor) -> tuple[Tensor, Tensor]:
    deviation = a.double().std(1, correction=0)
    return pool(a, math.inf), deviation.where(deviation > _FLAT, 1)


def _minmax(a: Tensor) -> tuple[Tensor, Tensor]:
    low, high = a.double().aminmax(dim=1)
    return low, (high - low).where(high - low > _FLAT, 1)


def _calibrated(a: Tensor, mean_logit: Tensor, image: Tensor, temperature: float = 1.0) -> Tensor:
    pooled = pool(a, temperature)
    return calibrated_weight(pooled, mean_logit, image) * pooled


def _sinkhorn(a: Tensor, temperature: float = 1.0, iterations: int = 10) -> Tensor:
    return pool(a - prompt_potentials(lambda: [a.double()], temperature, iterations), temperature)


def _dual(a: Tensor, image_logits: Tensor, temperature: float = 199.0, image_temperature: float = 100 / 3) -> Tensor:
    """T = scale / β with the authors' β₁ = 1/1.99 and β₂ = 3 at CLIP's scale of 100; `image_logits` [C, K] at that too."""
    texts, images = pool(a, temperature), pool(image_logits, image_temperature)
    return (image_temperature * texts + temperature * images) / (temperature + image_temperature)


_CORRECTIONS: dict[str, Callable[..., Any]] = {
    "clip": lambda a: a.new_zeros(len(a), dtype=torch.float64),
    "bsap": lambda a, temperature=1.0: pool(a, temperature),
    "bsap_minmax": _minmax,
    "bsap_zscore": _zscore,
    "subtraction": lambda a, weight=1.0: weight * pool(a, math.inf),
    "dn": lambda a, weight=0.5: weight * pool(a, math.inf),
    "nnn": lambda a, k=128, weight=0.75: _nearest(a, k, weight),
    "csls": lambda a, k=10, weight=0.5: _nearest(a, k, weight),
    "qb_norm": lambda a, temperature=5.0: pool(a, temperature),  # the source has β = 20, at CLIP's scale of 100
    "bsap_calibrated": _calibrated,
    "sinkhorn": _sinkhorn,
    "db_norm": _dual,
}


def _corrected(name: str, s: Tensor, a: Tensor, pairs: Pairs, **options: Any) -> Tensor:
    shift, scale = shift_and_scale(a, name, **options)
    return (s.double() - shift[pairs.candidate]) / scale[pairs.candidate]


def _bsap_h(s: Tensor, a: Tensor, pairs: Pairs, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Log-odds of BSAP-H, from logarithms: weight 0 ranks as BSAP and 1 as CLIP even where h rounds to 0 or 1."""
    log_share, log_odds = _log_softmax(s, pairs), _log_odds(s, a, pairs, temperature)
    log_weight, log_rest = (math.log(w) if w else -math.inf for w in (weight, 1 - weight))
    # only one candidate can hold nearly all of the softmax, so keeping 1 − softmax off 0 ties nothing
    log_others = (-log_share.exp().clamp(max=1 - 1e-16)).log1p()
    log_h = torch.logaddexp(log_weight + log_share, log_rest + logsigmoid(log_odds))
    return log_h - torch.logaddexp(log_weight + log_others, log_rest + logsigmoid(-log_odds))


def _tas(s: Tensor, a: Tensor, pairs: Pairs, weight: float = 0.7) -> Tensor:
    """The image's other expressions are the bank: their logits stand in the same table."""
    total = torch.zeros(len(a), dtype=torch.float64).index_add(0, pairs.candidate, s.double())[pairs.candidate]
    others = pairs.candidate.bincount(minlength=len(a))[pairs.candidate] - 1
    return s - weight * (total - s) / others.clamp(min=1)


METHODS: dict[str, Callable[..., Tensor]] = {name: partial(_corrected, name) for name in _CORRECTIONS}
METHODS |= {"bsap_h": _bsap_h, "tas": _tas}
