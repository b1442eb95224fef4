"""A benchmark from beginning to end: load, first generations, rounds by turns, the matrices that cost most."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .bounds import MachineSpeed, Traffic, bound_of
from .generation import Cell, Timing
from .matrices import medians, slow_matrices
from .result import ModelFigures, Row, SpeedReport, figures
from .rounds import LARGEST_NOISE, Patience, Rounds, measure_rounds
from .worker import Cold, Loaded, OutOfMemory

_MATRIX_ROUNDS = 5


class Caller(Protocol):
    """A model to run: `RemoteWorker`, or what calls a `Worker` here."""

    name: str

    def call(self, method: str, *arguments: Any) -> Any: ...


@dataclass
class Session:
    """The models and what is asked of them.

    Attributes:
        workers: by name; the first one is what others are compared with.
        rows: what is timed.
        cells: in which.
        new_tokens: of every sequence.
        patience: how often.
        refuse: why a cell does not fit beside all models, None if it does; asked when they are loaded.
        tell: takes a line on what is being done.
    """

    workers: Mapping[str, Caller]
    rows: list[Row]
    cells: list[Cell]
    new_tokens: int
    patience: Patience
    refuse: Callable[[Cell], str | None]
    tell: Callable[[str], None]
    loaded: dict[str, Loaded] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    machine: MachineSpeed | None = None
    cold: dict[tuple[str, Cell], Cold] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self, report: Callable[[MachineSpeed, Loaded], SpeedReport]) -> SpeedReport:
        """Measure everything; `report` makes the empty one, of the machine and the first model.

        Raises:
            OutOfMemory: a model cannot be loaded.
            ValueError: no cell fits.
        """
        self._load()
        assert self.machine is not None
        found = report(self.machine, next(iter(self.loaded.values())))
        found.models = [self._model(name) for name in self.loaded]
        self._first_generations()
        for cell in self.cells:
            rows = [row for row in self.rows if (row.name, cell) in self.cold]
            if rows:
                self._measure(cell, rows, found)
        if not found.cells:
            raise ValueError(f"nothing could be measured: {'; '.join(self.notes)}")
        for cell in self._worth_a_look(found):
            self._look_at_matrices(cell, found)
        found.notes += self.notes
        return found

    def _load(self) -> None:
        for name, worker in self.workers.items():
            self.tell(f"loading {name}")
            loaded: Loaded = worker.call("load")
            self.loaded[name] = loaded
            if self.machine is None:
                self.machine = worker.call("machine", loaded.dtype)
            self.traffic[name] = worker.call("traffic")
            worker.call("free")
            for row in [row for row in self.rows if row.worker == name and row.compiled and loaded.offloaded]:
                self.rows.remove(row)
                self.notes.append(f"{row.name}: left out, since weights of {name} are offloaded")
        refused = {cell: reason for cell in self.cells if (reason := self.refuse(cell)) is not None}
        self.notes += [f"{cell}: left out: {reason}" for cell, reason in refused.items()]
        self.cells = [cell for cell in self.cells if cell not in refused]

    def _model(self, name: str) -> ModelFigures:
        loaded, traffic = self.loaded[name], self.traffic[name]
        return ModelFigures(
            name, loaded.weight_bytes, loaded.cold, loaded.warm, traffic.macs, traffic.weight_bytes, loaded.offloaded
        )

    def _first_generations(self) -> None:
        """Every row in every cell, those that compile last: the memory of their graphs is not that of others.

        The longest prompts first: transformers keeps static caches as long as the longest that it ever made.
        """
        for row in sorted(self.rows, key=lambda row: row.compiled):
            for cell in sorted(self.cells, key=lambda cell: -cell.prompt):
                self.tell(f"{row.name}, {cell}: first time")
                try:
                    cold = self._with_room(row, "cold", cell, row.compiled)
                except OutOfMemory as error:
                    self.notes.append(f"{row.name}, {cell}: does not fit: {error}")
                    continue
                except Exception as error:
                    if not row.compiled:
                        raise
                    self.notes.append(f"{row.name}: left out, since it does not compile: {error}")
                    break
                self.cold[row.name, cell] = cold
                if cold.note is not None and f"{row.name}: {cold.note}" not in self.notes:
                    self.notes.append(f"{row.name}: {cold.note}")

    def _with_room(self, row: Row, method: str, *arguments: Any) -> Any:
        """Call; where it does not fit once more, when all others have given back what they do not use."""
        try:
            return self.workers[row.worker].call(method, *arguments)
        except OutOfMemory:
            for worker in self.workers.values():
                with contextlib.suppress(OutOfMemory):  # its process is gone
                    worker.call("free")
            return self.workers[row.worker].call(method, *arguments)

    def _measure(self, cell: Cell, rows: Sequence[Row], report: SpeedReport) -> None:
        by_name = {row.name: row for row in rows}

        def generate(name: str) -> Timing:
            row = by_name[name]
            timing: Timing = self._with_room(row, "run", cell, row.compiled)
            return timing

        self.tell(f"{cell}: {', '.join(by_name)} by turns")
        try:
            rounds = measure_rounds(list(by_name), generate, self.patience)
        except OutOfMemory as error:
            self.notes.append(f"{cell}: left out: it did not fit beside the other models: {error}")
            return
        report.noise[cell] = rounds.noise
        report.cells += [self._figures(row, cell, rounds) for row in rows]
        if not rounds.can_tell:
            self.notes.append(
                f"{cell}: cannot tell: {rows[0].name} against itself differs by {rounds.noise:.0%}, more than "
                f"{LARGEST_NOISE:.0%}, in {len(rounds.timings[rows[0].name])} rounds; something else uses the "
                "machine, or more rounds are needed (--rounds)"
            )

    def _figures(self, row: Row, cell: Cell, rounds: Rounds) -> Any:
        cold = self.cold[row.name, cell]
        assert self.machine is not None
        bound = bound_of(self.traffic[row.worker], cell, self.new_tokens, self.machine)
        return figures(row, cell, rounds, (cold.timing, cold.peak), bound)

    def _worth_a_look(self, report: SpeedReport) -> list[Cell]:
        """The first cell, and those in which a row is slower than what it is compared with."""
        slower = [found.cell for found in report.cells if is_slower(found.first_times) or is_slower(found.gap_times)]
        return list(dict.fromkeys([report.cells[0].cell, *slower]))

    def _look_at_matrices(self, cell: Cell, report: SpeedReport) -> None:
        there = [row.worker for row in self.rows if not row.compiled and (row.name, cell) in self.cold]
        if "dense" not in there or "checkpoint" not in there:
            return
        self.tell(f"{cell}: every matrix")
        names = self.workers["checkpoint"].call("matrices")
        rounds = [
            {name: self.workers[name].call("matrix_times", names, cell) for name in ("dense", "checkpoint")}
            for _ in range(_MATRIX_ROUNDS)
        ]
        dense, compressed = (medians(each[name] for each in rounds) for name in ("dense", "checkpoint"))
        report.slow[cell] = slow_matrices(dense, compressed)
        alone = sum(name not in dense for name in compressed)
        if alone:
            self.notes.append(f"{cell}: {alone} matrices are stacked in the dense model: not compared")


def is_slower(times: float | None) -> bool:
    """Whether a row is slower than what it is compared with, noise aside."""
    return times is not None and times * (1 + LARGEST_NOISE) < 1
