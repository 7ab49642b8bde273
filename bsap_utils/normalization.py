"""BSAP, BSAP-H and the training-free corrections beside them: pure functions on two logit matrices.

Every method takes `query_logits` [R, Q] (regions × texts asked for) and `aux_logits` [R, M] (the same regions ×
auxiliary prompts). The columns of `query_logits` are treated independently, so they may be texts that all regions
share, or *slots*: column j of a region is the j-th expression of its own image, NaN where the image has fewer.
A NaN slot stays NaN and disturbs nothing else.

Most methods are one family, `query − weight · pool(aux)`, that is one number taken off each region (`family`):

    method       pool over a region's auxiliary logits     weight   source
    clip         none                                      0        Radford et al. 2021
    bsap         logsumexp at temperature 1                1        arXiv 2402.18400
    qb_norm      logsumexp at temperature 1/β              1        Bogolin et al. 2022
    subtraction  mean (temperature ∞)                      1        Shtedritski et al. 2023 (Red Circle)
    dn           mean                                      0.5      Zhou et al. 2023, as a ranking over regions
    nnn          mean of the k largest                     0.75     Chowdhury et al. 2024

All functions promote half precision and integers to float32, keep float64, run on any device and are differentiable
(where no slot is NaN). They raise ValueError on shapes that do not fit, no auxiliary prompt, NaN or infinite values
(NaN slots apart), a `group` that is not one whole number ≥ 0 a region, and temperatures ≤ 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def region_bias(aux_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T · logsumexp(aux / T) over the auxiliary prompts, [R, M] -> [R]: what BSAP takes off a region's logits.

    Its part T · log M is the same for every region: it moves BSAP's value (more prompts, smaller values), never the
    ranking. The rest is a soft maximum, from the largest logit (T → 0) to the mean (T → ∞). T · log M grows without
    bound with T, and what tells regions apart then drowns in rounding: `family` leaves it out and ranks at any T.

    >>> region_bias(torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    tensor([0.6931, 3.0486])
    """
    aux_logits = _checked_aux(aux_logits)
    return _checked_temperature(temperature) * (aux_logits / temperature).logsumexp(1)


@torch.no_grad()
def region_bias_from_features(
    features: Tensor, aux_features: Tensor, logit_scale: float, temperature: float = 1.0, block: int = 2**18
) -> Tensor:
    """Return `region_bias` of unit features, [R, D] and [M, D] -> [R], without ever holding the [R, M] logits.

    At most `block` logits (or one region's) exist at a time: small enough for a CPU's cache, so that it takes hardly
    longer than the matrix product. `logit_scale` has its exp already taken (CLIP: 100). No gradients.

    >>> region_bias_from_features(torch.eye(2), torch.eye(2), logit_scale=3.0)
    tensor([3.0486, 3.0486])
    """
    scale = logit_scale / _checked_temperature(temperature)
    pool = partial(torch.logsumexp, dim=1, keepdim=True)
    return temperature * _by_block(pool, features, aux_features, scale, block)[:, 0]


def _by_block(
    function: Callable[[Tensor], Tensor], features: Tensor, aux_features: Tensor, logit_scale: float, block: int
) -> Tensor:
    """Return function(logits) of unit features, [R, D] and [M, D] -> [R, K], at most `block` logits (or one row's) at a time."""
    if features.ndim != 2 or aux_features.ndim != 2 or features.shape[1] != aux_features.shape[1]:
        shapes = f"features {list(features.shape)} and aux_features {list(aux_features.shape)}"
        raise ValueError(f"{shapes} do not fit: [R, D] and [M, D] are needed.")
    if not len(aux_features):
        raise ValueError("aux_features has no auxiliary prompt: at least one is needed.")
    _refuse("aux_features", aux_features, ~aux_features.isfinite())
    dtype = torch.promote_types(torch.promote_types(features.dtype, aux_features.dtype), torch.float32)
    scaled = (aux_features.to(dtype) * logit_scale).T
    width = function(scaled[:1]).shape[1]
    values = torch.empty(len(features), width, dtype=dtype, device=features.device)  # in place: pieces would fragment
    rows = max(block // len(aux_features), 1)
    for part, of_part in zip(features.split(rows), values.split(rows), strict=True):
        of_part.copy_(function(part.to(dtype) @ scaled))
    if not values.isfinite().all():
        _refuse("features", features, ~features.isfinite())
    return values


def family(
    query_logits: Tensor, aux_logits: Tensor, weight: float = 1.0, temperature: float = 1.0, nearest: int | None = None
) -> Tensor:
    """Return query − weight · T · log(mean(exp(aux / T))), [R, Q] and [R, M] -> [R, Q]: the module's table.

    The pool is `region_bias` less its constant T · log M: scores stay on the scale of the logits, and rank as
    `query − weight · region_bias` does, at every temperature; T = math.inf is the mean. `nearest` pools over the
    largest `nearest` auxiliary logits of a region only (over all where there are fewer); 1 is the maximum, T → 0.

    >>> family(torch.tensor([[2.0], [2.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]]), temperature=math.inf)
    tensor([[1.5000],
            [0.5000]])
    """
    query_logits, aux_logits = _checked(query_logits, aux_logits)
    return query_logits - _pooled(aux_logits, weight, temperature, nearest)[0]


def bsap(query_logits: Tensor, aux_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return BSAP, exp(q/T) / (exp(q/T) + Σ_m exp(a_m/T)), [R, Q] and [R, M] -> [R, Q] in (0, 1) (arXiv 2402.18400).

    It is the logistic of (query − region_bias) / T. In float32 that rounds to 1 from 17 on, so values are held just
    inside the interval and may tie there: *rank* by METHODS["bsap"], which does not saturate.

    >>> bsap(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([[0.9094, 0.3333]])
    """
    value = _log_odds(query_logits, aux_logits, temperature).sigmoid()
    limits = torch.finfo(value.dtype)
    return value.clamp(limits.tiny, 1 - limits.eps / 2)


def bsap_hybrid(
    query_logits: Tensor, aux_logits: Tensor, group: Tensor, weight: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Return BSAP-H, weight · softmax of the query over its image's regions + (1 − weight) · BSAP: [R, Q] in [0, 1].

    `group` [R] is the image (0, 1, …) of each region. The softmax is that of CLIP's logits as they are; `temperature`
    is BSAP's. METHODS["bsap_h"] ranks alike and does not saturate.

    >>> bsap_hybrid(torch.tensor([[1.0], [1.0], [9.0]]), torch.zeros(3, 1), torch.tensor([0, 0, 1]))
    tensor([[0.6155],
            [0.6155],
            [0.9999]])
    """
    softmax = group_log_softmax(query_logits, group).exp()
    return _checked_share(weight) * softmax + (1 - weight) * bsap(query_logits, aux_logits, temperature)


def group_log_softmax(logits: Tensor, group: Tensor) -> Tensor:
    """Return the logarithm of the softmax over the regions of each group, column by column: [R, Q], [R] -> [R, Q].

    >>> group_log_softmax(torch.tensor([[1.0], [1.0], [9.0]]), torch.tensor([0, 0, 1])).exp().ravel()
    tensor([0.5000, 0.5000, 1.0000])
    """
    logits = _checked_query(logits)
    group = _checked_group(logits, group)
    index = group[:, None].expand_as(logits)
    groups = int(group.max()) + 1 if len(group) else 0
    # a softmax does not change when all its logits are shifted alike, so the maximum needs no gradient
    top = logits.new_full((groups, logits.shape[1]), -math.inf).scatter_reduce(0, index, logits.detach(), "amax")
    shifted = logits - top.gather(0, index)
    total = torch.zeros_like(top).scatter_reduce(0, index, shifted.exp(), "sum")
    return shifted - total.gather(0, index).log()


def shift_and_scale(aux_logits: Tensor, method: str = "bsap", **options: float) -> tuple[Tensor, Tensor]:
    """Return the shift and the scale of each region, [R, M] -> [R] and [R]: METHODS gives (query − shift) / scale.

    So a method is two numbers a region, whatever is asked, and fits into an index of vectors (`retrieval`). `options` are
    those of METHODS[`method`]. Raises ValueError for a method that is not of this form: "bsap_h" also needs the query.

    >>> shift_and_scale(torch.tensor([[1.0, 3.0]]), "bsap_zscore")
    (tensor([2.]), tensor([1.]))
    """
    shift, scale = _correction(method)(_checked_aux(aux_logits), **options)
    return shift[:, 0], scale[:, 0]


@torch.no_grad()
def shift_and_scale_from_features(
    features: Tensor,
    aux_features: Tensor,
    logit_scale: float,
    method: str = "bsap",
    block: int = 2**18,
    **options: float,
) -> tuple[Tensor, Tensor]:
    """Return `shift_and_scale` of unit features, [R, D] and [M, D] -> [R] and [R], in `region_bias_from_features`'s memory.

    >>> shift_and_scale_from_features(torch.eye(2), torch.eye(2), logit_scale=3.0, method="subtraction")
    (tensor([1.5000, 1.5000]), tensor([1., 1.]))
    """
    correct = _correction(method)
    values = _by_block(lambda aux: torch.cat(correct(aux, **options), 1), features, aux_features, logit_scale, block)
    return values[:, 0], values[:, 1]


def default_options(method: str) -> dict[str, float]:
    """Return the options of METHODS[`method`] with their defaults. Raises ValueError for a method that there is not.

    >>> default_options("nnn"), default_options("bsap_h")
    ({'k': 16, 'weight': 0.75}, {'weight': 0.5, 'temperature': 1.0})
    """
    function = _bsap_h if method == "bsap_h" else _correction(method)
    return {p.name: p.default for p in signature(function).parameters.values() if p.default is not p.empty}


# A correction takes auxiliary logits [R, M] in floats and returns a shift and a scale, [R, 1] each; all but BSAP-H are one.


def _clip(aux: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP as it is: the query logits."""
    return torch.zeros_like(aux[:, :1]), torch.ones_like(aux[:, :1])


def _bsap(aux: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Query − region bias, but for a constant: T times the log-odds of BSAP, hence its ranking, unsaturated."""
    return _pooled(aux, temperature=temperature)


def _bsap_minmax(aux: Tensor) -> tuple[Tensor, Tensor]:
    """(query − smallest auxiliary logit) / their range; a region whose range is 0 is only shifted."""
    low, high = aux.aminmax(dim=1, keepdim=True)
    return low, torch.where(high - low > _rounding(aux), high - low, 1.0)


def _bsap_zscore(aux: Tensor) -> tuple[Tensor, Tensor]:
    """(query − mean) / standard deviation of the M auxiliary logits; a region without any spread is only shifted."""
    mean = aux.mean(1, keepdim=True)
    variance = (aux - mean).square().mean(1, keepdim=True)
    # replaced before the root, which has no gradient at 0
    return mean, torch.where(variance > _rounding(aux) ** 2, variance, 1.0).sqrt()


def _subtraction(aux: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Query − mean auxiliary logit."""
    return _pooled(aux, weight, math.inf)


def _dn(aux: Tensor, weight: float = 0.5) -> tuple[Tensor, Tensor]:
    """Query − half the mean auxiliary logit (the source's mean over images is one number a column: no matter here)."""
    return _pooled(aux, weight, math.inf)


def _nnn(aux: Tensor, k: int = 16, weight: float = 0.75) -> tuple[Tensor, Tensor]:
    """Query − 0.75 · mean of the k largest auxiliary logits, or of all M where M < k."""
    return _pooled(aux, weight, math.inf, k)


def _qb_norm(aux: Tensor, temperature: float = 5.0) -> tuple[Tensor, Tensor]:
    """Inverted softmax. The source has β = 20 on cosines: on logits T = logit scale / β, 5 at CLIP's scale of 100.

    This is the static form. The dynamic one corrects a query only if its best region is also an auxiliary prompt's
    best of the whole gallery, which has no counterpart among the few regions of one image.
    """
    return _pooled(aux, temperature=temperature)


def _pooled(
    aux: Tensor, weight: float = 1.0, temperature: float = 1.0, nearest: int | None = None
) -> tuple[Tensor, Tensor]:
    """The shift of `family`: weight · T · log(mean(exp(aux / T))), over the `nearest` largest auxiliary logits only."""
    if not math.isfinite(weight):
        raise ValueError(f"weight is {weight}: it must be a finite number.")
    if nearest is not None:
        if nearest < 1:
            raise ValueError(f"{nearest} nearest auxiliary prompts: at least one is needed.")
        aux = aux.topk(min(nearest, aux.shape[1]), 1).values
    return weight * _soft_maximum(aux, temperature)[:, None], torch.ones_like(aux[:, :1])


_CORRECTIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "clip": _clip,
    "bsap": _bsap,
    "bsap_minmax": _bsap_minmax,
    "bsap_zscore": _bsap_zscore,
    "subtraction": _subtraction,
    "dn": _dn,
    "nnn": _nnn,
    "qb_norm": _qb_norm,
}


def _correction(method: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if method not in _CORRECTIONS:
        known = ", ".join(_CORRECTIONS)
        raise ValueError(f"{method!r} is no method of one shift and scale a region; these are: {known}.")
    return _CORRECTIONS[method]


def _corrected(
    correct: Callable[..., tuple[Tensor, Tensor]], query: Tensor, aux: Tensor, group: Tensor, **options: float
) -> Tensor:
    """(query − shift) / scale; `group`, which it has no use for, is checked: a wrong one would go unnoticed until the ranking."""
    query, aux = _checked(query, aux, group)
    shift, scale = correct(aux, **options)
    return (query - shift) / scale


def _bsap_h(query: Tensor, aux: Tensor, group: Tensor, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Log-odds of BSAP-H, from logarithms: weight 0 ranks as BSAP and 1 as CLIP even where h rounds to 0 or 1."""
    log_softmax = group_log_softmax(query, group)
    log_odds = _log_odds(query, aux, temperature)
    log_weight, log_rest = (math.log(w) if w else -math.inf for w in (_checked_share(weight), 1 - weight))
    # only one region of a column can hold nearly all of the softmax, so keeping 1 − softmax off 0 ties nothing
    log_others = (-log_softmax.exp().clamp(max=1 - torch.finfo(log_softmax.dtype).eps / 2)).log1p()
    log_h = torch.logaddexp(log_weight + log_softmax, log_rest + logsigmoid(log_odds))
    return log_h - torch.logaddexp(log_weight + log_others, log_rest + logsigmoid(-log_odds))


# METHODS[name](query_logits, aux_logits, group, **options) -> scores [R, Q], higher is better. They are made to rank
# the regions of one column; on which scale differs from method to method.
METHODS: dict[str, Callable[..., Tensor]] = {
    name: _bsap_h if name == "bsap_h" else partial(_corrected, _correction(name))
    for name in ("clip", "bsap", "bsap_h", "bsap_minmax", "bsap_zscore", "subtraction", "dn", "nnn", "qb_norm")
}


def _log_odds(query: Tensor, aux: Tensor, temperature: float) -> Tensor:
    """BSAP's log-odds, (query − region bias) / T: [R, Q]."""
    query, aux = _checked(query, aux)
    return query / _checked_temperature(temperature) - (aux / temperature).logsumexp(1, keepdim=True)


def _soft_maximum(aux: Tensor, temperature: float) -> Tensor:
    """T · log(mean(exp(aux / T))), [R, M] -> [R]: from the maximum (T → 0) to the mean (T = ∞)."""
    if temperature == math.inf:
        return aux.mean(1)
    top = aux.detach().amax(1, keepdim=True)  # cancels out, so it needs no gradient
    exponent = (aux - top) / _checked_temperature(temperature)
    total = exponent.exp().sum(1)
    log_mean = total.log() - math.log(aux.shape[1])
    near = total > aux.shape[1] / 2
    if near.any():  # at large T log1p keeps what log M would swallow; elsewhere the sum is far from it, and costs half
        log_mean = torch.where(near, exponent.expm1().mean(1).log1p(), log_mean)
    return top[:, 0] + temperature * log_mean


def _rounding(aux: Tensor) -> Tensor:
    """The spread [R, 1] below which logits are equal but for rounding: dividing by it would only magnify noise."""
    return 8 * torch.finfo(aux.dtype).eps * aux.detach().abs().amax(1, keepdim=True).clamp(min=1)


def _refuse(name: str, matrix: Tensor, wrong: Tensor) -> None:
    if wrong.any():
        first, where = wrong.nonzero()[0].tolist(), f"{name} {list(matrix.shape)}"
        raise ValueError(f"{where} has {int(wrong.sum())} NaN or infinite values, the first at row, column {first}.")


def _checked(query: Tensor, aux: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return both matrices in one float type, or say what does not fit."""
    query, aux = _checked_query(query), _checked_aux(aux)
    if len(query) != len(aux):
        shapes = f"query_logits {list(query.shape)} and aux_logits {list(aux.shape)}"
        raise ValueError(f"{shapes} differ in their number of regions (rows).")
    if group is not None:
        _checked_group(query, group)
    dtype = torch.promote_types(query.dtype, aux.dtype)
    return query.to(dtype), aux.to(dtype)


def _checked_query(query: Tensor) -> Tensor:
    if query.ndim != 2:
        raise ValueError(f"query_logits {list(query.shape)} is no matrix [regions, texts].")
    _refuse("query_logits", query, query.isinf())  # a NaN is an empty slot here
    return query.to(torch.promote_types(query.dtype, torch.float32))


def _checked_aux(aux: Tensor) -> Tensor:
    if aux.ndim != 2 or not aux.shape[1]:
        raise ValueError(f"aux_logits {list(aux.shape)} is no matrix [regions, auxiliary prompts], one prompt or more.")
    _refuse("aux_logits", aux, ~aux.isfinite())
    return aux.to(torch.promote_types(aux.dtype, torch.float32))


def _checked_group(query: Tensor, group: Tensor) -> Tensor:
    if group.shape != query.shape[:1]:
        shapes = f"group {list(group.shape)} does not fit query_logits {list(query.shape)}"
        raise ValueError(f"{shapes}: one image a region is needed.")
    if group.is_floating_point() or group.dtype == torch.bool:
        raise ValueError(f"group is {group.dtype}: whole numbers 0, 1, … are needed.")
    if len(group) and group.min() < 0:
        raise ValueError(f"group has the negative image {int(group.min())}: images are numbered from 0.")
    empty = query.isnan()
    if empty.any():  # a slot is empty for all regions of an image or for none
        count = torch.zeros(int(group.max()) + 1, query.shape[1], device=query.device).index_add(
            0, group, empty.float()
        )
        torn = (count > 0) & (count < group.bincount()[:, None])
        if torn.any():
            image, column = torn.nonzero()[0].tolist()
            raise ValueError(f"query_logits is NaN for some regions of image {image} in column {column}, not for all.")
    return group.long()


def _checked_temperature(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be positive and finite.")
    return temperature


def _checked_share(weight: float) -> float:
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}: the hybrid mixes two probabilities, so it must lie in 0 … 1.")
    return weight
