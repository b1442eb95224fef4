"""What rounding costs the loss, for every matrix and storage: the other half of the price list of a mixture.

All of it in the metric of `kfac`, in nats per token, like the squares of its singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..allocation.prices import Rounding
from ..calibration.layout import Layout
from ..factorization.factors import Decomposition, Factors
from ..factorization.registry import factorization_named
from ..nn.placement import dense_weight
from ..storage.costs import DENSE_INT8
from ..storage.inner_forms import gptq_bits_of
from ..storage.packing import pack, unpack
from ..storage.rounding import rounded
from .spectra import PreparedInputs
from .store import StatisticsStore

_METRIC = "kfac"
_RANK_STEP = 2
"""From one rank at which the rounding of factors is measured to the next; in between it is interpolated."""
_LOWEST_RANK = 32


def price_roundings(
    layout: Layout,
    store: StatisticsStore,
    factored: Sequence[str],
    whole: Sequence[str],
    device: torch.device | None = None,
    gptq_damping: float = 0.1,
) -> dict[str, dict[str, Rounding]]:
    """By matrix and storage, what rounding costs.

    Args:
        layout: the dense model's linears.
        store: its statistics, gradients included.
        factored: storages of factors to price.
        whole: storages of whole matrices to price.
        device: where to compute.
        gptq_damping: as in `GPTQConfig.damp_percent`.
    """
    row = factorization_named(_METRIC)
    found: dict[str, dict[str, Rounding]] = {}
    with tqdm(total=len(layout.linears), desc="pricing roundings", unit="matrix") as progress:
        for block in layout.blocks:
            linears = layout.linears_of(block)
            prepared = PreparedInputs(row, store, block, device)
            for name, module in linears.items():
                weight = dense_weight(module).to(device).double()
                gram, root = prepared.of(name)
                metric = _Metric(gram, root.root, gptq_damping)
                ranks = _of_ranks(row.decompose(weight, (gram, root)), factored, metric) if factored else {}
                found[name] = {
                    storage: Rounding(
                        metric.of_whole(weight, storage) if storage in whole else None, ranks.get(storage)
                    )
                    for storage in dict.fromkeys([*factored, *whole])
                }
                progress.update()
    return found


class _Metric:
    """The metric of one linear: the Gram `H` of its inputs, and a root of what the loss feels of its outputs."""

    def __init__(self, gram: Tensor, root: Tensor, gptq_damping: float) -> None:
        self.gram, self.root, self._gptq_damping = gram, root, gptq_damping
        self._conditional: dict[tuple[int, float], Tensor] = {}

    def of_whole(self, weight: Tensor, storage: str) -> float:
        """What rounding the whole matrix costs."""
        return self._of_error(rounded(weight, storage) - weight, storage, self.gram, self.root.square().sum(1))

    def of_factors(self, factors: Factors, storages: Sequence[str]) -> dict[str, float]:
        """What rounding both factors costs, by storage."""
        inner_gram = factors.first @ self.gram @ factors.first.T
        # Those of an earlier rank may have lain at the same address.
        self._conditional = {key: value for key, value in self._conditional.items() if key[0] == id(self.gram)}
        felt = self.root.T @ factors.second
        found = {}
        for storage in storages:
            first, second = rounded(factors.first, storage), rounded(factors.second, storage)
            # Errors of different outputs are independent, so only the diagonal of what is felt of them counts.
            of_first = self._of_error(first - factors.first, storage, self.gram, felt.square().sum(0))
            of_second = self._of_error(second - factors.second, storage, inner_gram, self.root.square().sum(1))
            found[storage] = of_first + of_second
        return found

    def _of_error(self, error: Tensor, storage: str, gram: Tensor, felt: Tensor) -> float:
        """Of the error that rounding each value makes, what is left when the inputs after it make up for it."""
        if storage in _EACH_VALUE_ALONE:
            return float((felt * ((error @ gram) * error).sum(1)).sum())
        key = (id(gram), self._gptq_damping if gptq_bits_of(storage) is not None else 0.01)
        if key not in self._conditional:
            self._conditional[key] = conditional_variances(gram, key[1])
        return float((felt * (error.square() @ self._conditional[key])).sum())


_EACH_VALUE_ALONE = (DENSE_INT8, "llm_int8")


def _of_ranks(found: Decomposition, storages: Sequence[str], metric: _Metric) -> dict[str, Tensor]:
    """By storage, what the rounding of the factors costs more from one rank to the next."""
    count = min(len(found.left), found.right.shape[1])
    eight_bit = [storage for storage in storages if storage in ("int8", "remap")]
    result = {storage: _eight_bit_ranks(found, storage, metric, count) for storage in eight_bit}
    others = [storage for storage in storages if storage not in (*eight_bit, "plain")]
    if not others:
        return result
    points = [0]
    while points[-1] < count:
        points.append(min(count, max(_LOWEST_RANK, points[-1] * _RANK_STEP)))
    losses = [dict.fromkeys(others, 0.0)]
    for rank in points[1:]:
        losses.append(metric.of_factors(found.truncate(rank).balanced().mixed(), others))
    for storage in others:
        steps = torch.empty(count, dtype=torch.float64)
        for (low, below), (high, above) in pairwise(zip(points, losses, strict=True)):
            steps[low:high] = (above[storage] - below[storage]) / (high - low)
        result[storage] = steps
    return result


def _eight_bit_ranks(found: Decomposition, storage: str, metric: _Metric, count: int) -> Tensor:
    """Our own 8 bits round every rank by itself, so that what they cost adds up rank by rank."""
    factors = Factors(found.left, found.right).balanced()
    m, n = len(factors.second), factors.first.shape[1]
    second, first = unpack(storage, pack(storage, factors.second, factors.first, torch.float32), m, n)
    inner, outer = first.to(factors.first) - factors.first, second.to(factors.second) - factors.second
    of_first = (metric.root.T @ factors.second).square().sum(0) * ((inner @ metric.gram) * inner).sum(1)
    of_second = (metric.root.T @ outer).square().sum(0) * ((factors.first @ metric.gram) * factors.first).sum(1)
    total = (of_first + of_second).cpu()
    return torch.nn.functional.pad(total, (0, count - len(total)))


def conditional_variances(gram: Tensor, damping: float) -> Tensor:
    """Variance of each input given the inputs after it, `damping` (a share of the mean) added to all.

    Error feedback rounds inputs in order and makes up for each error with the inputs that are left, so that of an
    error only this part remains.
    """
    damped = gram.double().clone()
    damped.diagonal().add_(damping * damped.diagonal().mean().clamp_min(1e-300))
    factor = torch.linalg.cholesky(damped.flip(0, 1))
    return factor.diagonal().square().flip(0)
