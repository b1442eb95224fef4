"""The price list of ranks: singular values of every linear in a metric."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..model.layout import Layout
from ..model.offloaded import dense_weight
from ..statistics.collect import BlockStatistics
from ..statistics.store import StatisticsStore, full_gram
from .factors import Decomposition
from .registry import Factorization


class PreparedInputs:
    """What a factorizer makes of a block's statistics (an eigendecomposition, say), once for all that share an input.

    Args:
        row: the factorizer.
        store: the statistics, None where there are none.
        block: the block's name.
        device: where to compute.
    """

    def __init__(
        self, row: Factorization, store: StatisticsStore | None, block: str, device: torch.device | None
    ) -> None:
        self._row = row
        self._statistics = store.block(block) if store is not None else None
        self._gradients = store.gradients(block) if store is not None and row.needs_gradients else {}
        self._gradient_tokens = store.gradient_tokens if store is not None and row.needs_gradients else 0
        self._device = device
        self._prepared: dict[str, Any] = {}
        self._grams: dict[str, Tensor] = {}

    def of(self, linear: str) -> Any:
        """What the factorizer's functions take beside the weight; None for one that reads no data."""
        if self._row.needs is None:
            return None
        statistics, input_key = self._found(linear)
        if input_key not in self._prepared:
            statistic = (
                self._gram(statistics, input_key)
                if self._row.needs == "gram"
                else statistics.inputs[input_key].abs_mean
            )
            self._prepared[input_key] = self._row.prepare(statistic.to(self._device))
        if self._row.prepare_output is None:
            return self._prepared[input_key]
        return self._prepared[input_key], self._row.prepare_output(self._price_gram(linear, statistics, input_key))

    def gram(self, linear: str) -> Tensor | None:
        """`H` of that linear's input, `n x n` float64 on the compute device, or None without statistics."""
        return None if self._statistics is None else self._gram(*self._found(linear))

    def _gram(self, statistics: BlockStatistics, input_key: str) -> Tensor:
        if input_key not in self._grams:
            self._grams[input_key] = full_gram(statistics.inputs[input_key]).to(self._device)
        return self._grams[input_key]

    def _price_gram(self, linear: str, statistics: BlockStatistics, input_key: str) -> Tensor:
        """`G / (2 T_H T_G)`: with it, squared singular values add up to nats per token of text.

        The increase of the loss over the text of the gradients is `1/2 sum_t dy^T g g^T dy`, which K-FAC takes for
        `1/2 tr(G D H D^T) / T_H` with `D = W - W'` and `T_H` the tokens this linear saw; `T_G` is the length of that
        text. Nothing else may scale it: a division by `m`, say, makes matrices of different widths incomparable.
        """
        if linear not in self._gradients:
            raise ValueError(
                "there are no gradients of it: it was excluded when they were collected; use another folder"
            )
        tokens = statistics.inputs[input_key].tokens
        return full_gram(self._gradients[linear]).to(self._device) / (2 * tokens * self._gradient_tokens)

    def _found(self, linear: str) -> tuple[BlockStatistics, str]:
        """The statistics, and the name under which they have this linear's input."""
        if self._statistics is None:
            raise ValueError(f"factorization {self._row.name!r} needs calibration statistics, and there are none")
        if linear not in self._statistics.input_key:
            raise ValueError(
                "there are no statistics of it: it was excluded when they were collected; use another folder"
            )
        return self._statistics, self._statistics.input_key[linear]


def decompositions(
    layout: Layout,
    row: Factorization,
    store: StatisticsStore | None,
    device: torch.device | None,
    wanted: Container[str],
) -> Iterator[tuple[str, Decomposition, Tensor | None]]:
    """Every wanted linear's name, decomposition and input Gram (None without statistics), block by block.

    ValueError names the linear that cannot be decomposed.
    """
    for block in layout.blocks:
        names = [name for name in layout.linears_of(block) if name in wanted]
        if not names:
            continue
        inputs = PreparedInputs(row, store, block, device)
        for name in names:
            weight = dense_weight(layout.linears[name]).to(device)
            try:
                found = row.decompose(weight, inputs.of(name))
            except (ValueError, torch.linalg.LinAlgError) as error:
                raise ValueError(f"{name}: {error}") from error
            yield name, found, inputs.gram(name)


def input_grams(
    layout: Layout,
    row: Factorization,
    store: StatisticsStore | None,
    device: torch.device | None,
    wanted: Container[str],
) -> Iterator[tuple[str, Tensor | None]]:
    """Every wanted linear's name and input Gram (None without statistics), block by block."""
    for block in layout.blocks:
        names = [name for name in layout.linears_of(block) if name in wanted]
        if names:
            inputs = PreparedInputs(row, store, block, device)
            yield from ((name, inputs.gram(name)) for name in names)


def compute_spectra(
    layout: Layout, row: Factorization, store: StatisticsStore | None, device: torch.device | None
) -> Mapping[str, Tensor]:
    """All `min(m, n)` singular values (float64, descending) of every target in the metric of `row`.

    In the metric of `kfac` their squares are nats per token, see `PreparedInputs`. They are taken from the store if it
    has them, and kept there otherwise. ValueError names the linear that has none.
    """
    known = store.spectra(row.name) if store is not None else None
    if known is not None and all(name in known for name in layout.linears):
        return known
    spectra: dict[str, Tensor] = {}
    with tqdm(total=len(layout.linears), desc="pricing ranks", unit="matrix") as progress:
        for block in layout.blocks:
            linears = layout.linears_of(block)
            if not linears:
                continue
            prepared = PreparedInputs(row, store, block, device)
            for name, module in linears.items():
                spectra[name] = _spectrum(name, dense_weight(module).to(device), row, prepared)
                progress.update()
    if store is not None:
        store.put_spectra(row.name, spectra)
    return spectra


def _spectrum(name: str, weight: Tensor, row: Factorization, prepared: PreparedInputs) -> Tensor:
    try:
        values = row.spectrum(weight, prepared.of(name)).cpu()
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise ValueError(f"{name}: {error}") from error
    # A singular Gram leaves fewer directions than the matrix has: the others cost nothing, which is a price, too.
    return nn.functional.pad(values, (0, min(weight.shape) - len(values)))
