"""Decompositions and spectra (singular values in a metric) of a model's linears, block by block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..model.layout import Layout
from ..model.linears import weight_matrix
from ..model.offloaded import dense_weight
from ..statistics.collect import BlockStatistics
from ..statistics.store import StatisticsStore, full_gram
from .factors import Decomposition
from .parallel import in_threads, workers_for
from .registry import Factorization

R = TypeVar("R")


class PreparedInputs:
    """What a factorizer makes of a block's statistics (an eigendecomposition, say), once for all that share an input.

    It is computed on `device`, from the statistics of `block` in the store; without a store there are none.
    """

    def __init__(
        self, row: Factorization, store: StatisticsStore | None, block: str, device: torch.device | None
    ) -> None:
        self._row, self._device = row, device
        self._statistics = store.block(block) if store is not None else None
        self._gradients = store.gradients(block) if store is not None and row.needs_gradients else {}
        self._gradient_tokens = store.gradient_tokens if store is not None and row.needs_gradients else 0
        self._prepared: dict[str, Any] = {}
        self._grams: dict[str, Tensor] = {}
        self._lock = threading.RLock()  # linears that share an input are decomposed at once

    def of(self, linear: str) -> Any:
        """What the factorizer's functions take beside the weight; None for one that reads no data."""
        if self._row.needs is None:
            return None
        statistics, input_key = self._found(linear)
        with self._lock:
            if input_key not in self._prepared:
                by_gram = self._row.needs == "gram"
                statistic = self._gram(statistics, input_key) if by_gram else statistics.inputs[input_key].abs_mean
                self._prepared[input_key] = self._row.prepare(statistic.to(self._device))
        if self._row.prepare_output is None:
            return self._prepared[input_key]
        return self._prepared[input_key], self._row.prepare_output(self._price_gram(linear, statistics, input_key))

    def gram(self, linear: str) -> Tensor | None:
        """`H` of that linear's input, `n x n` float64 on the compute device, or None without statistics."""
        return None if self._statistics is None else self._gram(*self._found(linear))

    def _gram(self, statistics: BlockStatistics, input_key: str) -> Tensor:
        with self._lock:
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
        tokens = max(statistics.inputs[input_key].tokens, 1)  # none where the block does without it: `H` is zero
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


def _prepared(
    layout: Layout,
    row: Factorization,
    store: StatisticsStore | None,
    device: torch.device | None,
    wanted: Container[str],
) -> Iterator[tuple[str, PreparedInputs]]:
    """Every wanted linear's name and what is prepared for its block."""
    for block in layout.blocks:
        names = [name for name in layout.linears_of(block) if name in wanted]
        inputs = PreparedInputs(row, store, block, device) if names else None
        yield from ((name, inputs) for name in names if inputs is not None)


@contextmanager
def _naming(linear: str) -> Iterator[None]:
    """A context in which the ValueError for a matrix that cannot be decomposed says which it is."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise ValueError(f"{linear}: {error}") from error


def map_linears(
    layout: Layout,
    row: Factorization,
    store: StatisticsStore | None,
    device: torch.device | None,
    wanted: Container[str],
    function: Callable[[str, PreparedInputs], R],
) -> Iterator[R]:
    """Yield what a function makes of every wanted linear, by its name and inputs, block by block.

    On CPUs several at once (see `parallel`). ValueError names the linear that the function failed on.
    """
    shorter = (min(weight_matrix(module).shape) for name, module in layout.linears.items() if name in wanted)
    workers = workers_for(max(shorter, default=0), device)

    def named(found: tuple[str, PreparedInputs]) -> R:
        with _naming(found[0]):
            return function(*found)

    yield from in_threads(named, _prepared(layout, row, store, device, wanted), workers)


def decompositions(
    layout: Layout,
    row: Factorization,
    store: StatisticsStore | None,
    device: torch.device | None,
    wanted: Container[str],
) -> Iterator[tuple[str, Decomposition]]:
    """Every wanted linear's name and decomposition, block by block.

    ValueError names the linear that cannot be decomposed.
    """

    def decompose(name: str, inputs: PreparedInputs) -> tuple[str, Decomposition]:
        return name, row.decompose(dense_weight(layout.linears[name]).to(device), inputs.of(name))

    yield from map_linears(layout, row, store, device, wanted, decompose)


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

    def spectrum(name: str, inputs: PreparedInputs) -> tuple[str, Tensor]:
        weight = dense_weight(layout.linears[name]).to(device)
        values = row.spectrum(weight, inputs.of(name)).cpu()
        # A singular Gram leaves fewer directions than the matrix has: the others cost nothing, which is a score, too.
        return name, nn.functional.pad(values, (0, min(weight.shape) - len(values)))

    found = map_linears(layout, row, store, device, layout.linears, spectrum)
    spectra = dict(tqdm(found, total=len(layout.linears), desc="scoring directions", unit="matrix"))
    if store is not None:
        store.put_spectra(row.name, spectra)
    return spectra
