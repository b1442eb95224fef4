"""The price list of ranks: singular values of every linear in a metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration.layout import Layout
from ..factorization.registry import Factorization
from ..nn.placement import dense_weight
from .collect import BlockStatistics
from .store import StatisticsStore, full_gram


class PreparedInputs:
    """What a factoriser makes of an input's statistic (an eigendecomposition, say), once for all linears that share it."""

    def __init__(self, row: Factorization, statistics: BlockStatistics | None, device: torch.device | None) -> None:
        self._row = row
        self._statistics = statistics
        self._device = device
        self._prepared: dict[str, Any] = {}
        self._grams: dict[str, Tensor] = {}

    def of(self, linear: str) -> Any:
        """The prepared statistic of that linear's input; None for a factoriser that reads no data."""
        if self._row.needs is None:
            return None
        leader = self._leader(linear)
        if leader not in self._prepared:
            inputs = self._statistics.inputs[leader]  # type: ignore[union-attr]
            statistic = self.gram(linear) if self._row.needs == "gram" else inputs.abs_mean
            self._prepared[leader] = self._row.prepare(statistic.to(self._device))
        return self._prepared[leader]

    def gram(self, linear: str) -> Tensor | None:
        """`H` of that linear's input, `n x n` float64 on the compute device, or None without statistics."""
        if self._statistics is None:
            return None
        leader = self._leader(linear)
        if leader not in self._grams:
            self._grams[leader] = full_gram(self._statistics.inputs[leader]).to(self._device)
        return self._grams[leader]

    def _leader(self, linear: str) -> str:
        if self._statistics is None or linear not in self._statistics.leader:
            raise ValueError(f"there are no calibration statistics for {linear}: it was excluded when they were collected")
        return self._statistics.leader[linear]


def compute_spectra(
    layout: Layout, row: Factorization, store: StatisticsStore | None, device: torch.device | None
) -> Mapping[str, Tensor]:
    """Singular values (float64, descending) of every target in the metric of `row`; taken from the store if there."""
    known = store.spectra(row.name) if store is not None else None
    if known is not None and all(name in known for name in layout.linears):
        return known
    spectra: dict[str, Tensor] = {}
    progress = tqdm(total=len(layout.linears), desc="pricing ranks", unit="matrix")
    for block in layout.blocks:
        linears: dict[str, nn.Module] = layout.linears_of(block)
        if not linears:
            continue
        prepared = PreparedInputs(row, store.block(block) if store is not None else None, device)
        for name, module in linears.items():
            weight = dense_weight(module).to(device)
            spectra[name] = row.decompose(weight, prepared.of(name)).singular_values.cpu()
            progress.update()
    progress.close()
    if store is not None:
        store.put_spectra(row.name, spectra)
    return spectra
