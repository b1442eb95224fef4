"""Putting compressed matrices in the place of a model's linears, with a way back."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor
from torch.nn import Module
from tqdm.auto import tqdm

from ..allocation.plan import Plan
from ..encodings.registry import beside
from ..factorization.decompositions import PreparedInputs, map_linears
from ..factorization.errors import output_error
from ..factorization.factors import Factors
from ..factorization.sample_bases import SampleBasisVisitor
from ..model.offloaded import dense_weight
from ..statistics.store import StatisticsStore
from ..structures.format import Format
from ..structures.placement import replace_linear
from .collect import block_runner
from .job import Job


class Replacement:
    """A context in which linears are replaced one by one; an error inside puts them all back.

    `errors` has the relative output error `||(W - W')X|| / ||WX||` of each, measured on the factors as they are stored
    (rounded as their encoding rounds them), or None where there is no Gram to measure it with, and where they are
    quantized later.

    Args:
        model: the model.
        job: its layout loses the linears that are replaced if there is no way back.
        plan: what each linear becomes.
        undo_on_error: keep the dense linears until the end, so that there is a way back.
    """

    def __init__(self, model: Any, job: Job, plan: Plan, undo_on_error: bool) -> None:
        self.errors: dict[str, float | None] = {}
        self._model, self._plan, self._undo_on_error = model, plan, undo_on_error
        self._linears, self._device, self._encoding = job.layout.linears, job.device, job.config.encoding
        self._keep = self._encoding.needs_dense
        self._replaced: dict[str, Module] = {}
        total = sum(not module.leaves_as_is for module in plan.modules.values())
        self._progress = tqdm(total=total, desc="factorizing", unit="matrix")

    def put(self, name: str, source: Factors | Tensor, gram: Tensor | None) -> None:
        """Write a matrix in its format, measure its error, and put it in the place of the linear `name`.

        `source` is its factors, or the matrix itself for a structure without rank; `gram` is `H` of its inputs.
        """
        module = self._plan.modules[name]
        linear: Any = self._linears[name]
        format = Format(module.format.structure, beside(self._encoding, module.encoding))
        matrices = replace_linear(self._model, name, format, module.rank, source, gram)
        self.errors[name] = None
        if gram is not None and matrices is not None:
            stored = format.structure.product({key: each.double() for key, each in matrices.items()})
            lost, total = output_error(dense_weight(linear).to(self._device), stored.to(self._device), gram)
            self.errors[name] = lost / total if total else 0.0
        self._replaced[name] = linear

    def finish(self, name: str) -> None:
        """Let go of the dense linear `name`, unless it may have to be put back, or it is rounded towards."""
        if not self._undo_on_error:
            del self._linears[name]
            if not self._keep:
                del self._replaced[name]
        self._progress.update()

    def dense_linears(self) -> dict[str, Module]:
        """Return the dense linears that are still there, by name; here they stay only if they may have to be put back.

        They are there for an encoding that is rounded towards them.
        """
        found = dict(self._replaced)
        if not self._undo_on_error:
            self._replaced.clear()
        return found

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.close()
        if kind is not None:
            for name, linear in self._replaced.items():
                self._model.set_submodule(name, linear)


def factorize(model: Any, job: Job, plan: Plan, store: StatisticsStore | None, replacement: Replacement) -> None:
    """Replace every planned linear; those whose encoding wants text hold plain linears until they are quantized."""
    layout, row, device = job.layout, job.method.factorizer, job.device
    ranks = {name: module.rank for name, module in plan.modules.items() if module.rank is not None}
    rounded = {name for name, module in plan.modules.items() if module.rank is None and not module.leaves_as_is}
    if row.per_sample and job.windows is not None:

        def finished(block: str, factors: dict[str, Factors]) -> None:
            for name, found in factors.items():
                replacement.put(name, found, PreparedInputs(row, store, block, device).gram(name))
                replacement.finish(name)

        visitor = SampleBasisVisitor(layout.linears_of, ranks, finished)
        block_runner(model, job, job.windows).run(visitor, "second pass")
        written = rounded
    else:
        written = {*ranks, *rounded}

    def write(name: str, inputs: PreparedInputs) -> str:
        weight = dense_weight(layout.linears[name]).to(device)
        source: Factors | Tensor = weight
        if name in ranks:
            source = row.decompose(weight, inputs.of(name)).keep(plan.modules[name].kept)
        replacement.put(name, source, inputs.gram(name))
        return name

    for name in map_linears(layout, row, store, device, written, write):
        replacement.finish(name)
