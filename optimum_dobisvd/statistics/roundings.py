"""What rounding costs the loss, for every matrix and storage: the other half of the price list of a mixture.

All of it in the metric of `kfac`, in nats per token, like the squares of its singular values. Factors in the basis of
`kfac` have uncorrelated inner activations, so what the two factors lose adds up rank by rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..allocation.prices import Rounding
from ..calibration.layout import Layout
from ..factorization.factors import Decomposition, Factors
from ..factorization.registry import factorization_named
from ..nn.placement import dense_weight
from ..storage.inner_forms import gptq_bits_of
from ..storage.packing import pack, unpack
from ..storage.rounding import rounded
from .spectra import PreparedInputs
from .store import StatisticsStore

_METRIC = "kfac"
_DAMPING = 0.1
"""GPTQ's own, by the default of `GPTQConfig`: a share of the mean diagonal of `H`."""


def price_roundings(
    layout: Layout,
    store: StatisticsStore,
    factored: Sequence[str],
    whole: Sequence[str],
    device: torch.device | None = None,
) -> dict[str, dict[str, Rounding]]:
    """By matrix and storage, what rounding costs.

    Args:
        layout: the dense model's linears.
        store: its statistics, gradients included.
        factored: storages of factors to price.
        whole: storages of whole matrices to price.
        device: where to compute.
    """
    row = factorization_named(_METRIC)
    found: dict[str, dict[str, Rounding]] = {}
    with tqdm(total=len(layout.linears), desc="pricing roundings", unit="matrix") as progress:
        for block in layout.blocks:
            linears = layout.linears_of(block)
            prepared = PreparedInputs(row, store, block, device)
            feedback: dict[int, Tensor] = {}
            for name, module in linears.items():
                weight = dense_weight(module).to(device).double()
                gram, root = prepared.of(name)
                conditional = feedback.setdefault(id(gram), _conditional_variances(gram))
                factors = row.decompose(weight, (gram, root)) if factored else None
                prices = {}
                for storage in dict.fromkeys([*factored, *whole]):
                    prices[storage] = Rounding(
                        _whole(weight, storage, gram, root.root, conditional) if storage in whole else None,
                        _ranks(factors, storage, gram, root.root, conditional, min(weight.shape))
                        if factors is not None and storage in factored
                        else None,
                    )
                found[name] = prices
                progress.update()
    return found


def _whole(weight: Tensor, storage: str, gram: Tensor, root: Tensor, conditional: Tensor) -> float:
    error = rounded(weight, storage) - weight
    if gptq_bits_of(storage) is not None:
        return float((root.square().sum(1) * (error.square() @ conditional)).sum())
    felt = root.T @ error
    return float(((felt @ gram) * felt).sum())


def _ranks(found: Decomposition, storage: str, gram: Tensor, root: Tensor, conditional: Tensor, count: int) -> Tensor:
    """Both factors' losses by rank; zero for ranks that the metric does not have."""
    factors = Factors(found.left, found.right).balanced()
    second, first = _rounded_factors(factors, storage)
    inner, outer = first - factors.first, second - factors.second
    outputs_felt = (root.T @ factors.second).square().sum(0)
    if gptq_bits_of(storage) is not None:
        of_first = outputs_felt * (inner.square() @ conditional)
    else:
        of_first = outputs_felt * ((inner @ gram) * inner).sum(1)
    inner_variance = ((factors.first @ gram) * factors.first).sum(1)
    of_second = (root.T @ outer).square().sum(0) * inner_variance
    total = (of_first + of_second).cpu()
    return torch.nn.functional.pad(total, (0, count - len(total)))


def _rounded_factors(factors: Factors, storage: str) -> tuple[Tensor, Tensor]:
    if storage in ("int8", "remap"):
        m, n = len(factors.second), factors.first.shape[1]
        second, first = unpack(storage, pack(storage, factors.second, factors.first, torch.float32), m, n)
        return second.double(), first.double()
    if storage == "plain":
        return factors.second, factors.first
    return rounded(factors.second, storage), rounded(factors.first, storage)


def _conditional_variances(gram: Tensor) -> Tensor:
    """Variance of each input given the inputs after it.

    GPTQ rounds inputs in order and makes up for each error with the inputs that are left, so that of an error only
    this part remains.
    """
    damped = gram.double().clone()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp_min(1e-300))
    factor = torch.linalg.cholesky(damped.flip(0, 1))
    return factor.diagonal().square().flip(0)
