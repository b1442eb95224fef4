"""What a benchmark found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .bounds import Bound, MachineSpeed
from .generation import Cell, Timing
from .matrices import SlowMatrix
from .rounds import Rounds, first_token, per_token, slow_token


@dataclass(frozen=True)
class Row:
    """A way to run a model.

    Attributes:
        name: in tables.
        worker: the name of the model that runs.
        compiled: whether steps of one token are compiled, with a static cache.
        against: the row that it is compared with; None for the dense model itself.
    """

    name: str
    worker: str
    compiled: bool = False
    against: str | None = None


@dataclass(frozen=True)
class CellFigures:
    """One row in one cell: seconds, medians of the warm rounds unless it says otherwise.

    Attributes:
        row: its name.
        batch, prompt: of the cell.
        first: until the first token.
        first_cold: the same of the first generation.
        total_cold: seconds of the whole first generation, compilation included.
        gap, gap_p95: from one token to the next: median, and what 95 % stay below.
        tokens_per_second: of all sequences together, the prompt's pass included.
        peak_bytes: of memory, model included; None where the system does not tell.
        first_bound, gap_bound: what the machine takes at least.
        first_times, gap_times, tokens_times: how many times as fast as the row it is compared with; None without one.
    """

    row: str
    batch: int
    prompt: int
    first: float
    first_cold: float
    total_cold: float
    gap: float
    gap_p95: float
    tokens_per_second: float
    peak_bytes: int | None
    first_bound: float
    gap_bound: float
    first_times: float | None = None
    gap_times: float | None = None
    tokens_times: float | None = None

    @property
    def cell(self) -> Cell:
        """What was generated."""
        return Cell(self.batch, self.prompt)

    @property
    def first_reached(self) -> float:
        """The share of the bound that is reached in the pass over the prompt."""
        return self.first_bound / self.first

    @property
    def gap_reached(self) -> float:
        """The share of the bound that is reached in decoding."""
        return self.gap_bound / self.gap


@dataclass(frozen=True)
class ModelFigures:
    """One model as it was loaded.

    Attributes:
        name: `dense`, `checkpoint` or `fused`.
        weight_bytes: in memory.
        load_cold, load_warm: seconds; None where it was made and not loaded.
        macs: multiply-adds of its linears for one token.
        read_bytes: of weights that are read for one token.
        offloaded: whether some of it is not on the device.
    """

    name: str
    weight_bytes: int
    load_cold: float | None
    load_warm: float | None
    macs: int
    read_bytes: int
    offloaded: bool


@dataclass
class SpeedReport:
    """All that was found.

    Attributes:
        title: what was measured.
        device, dtype, attention: the same for all.
        threads: of PyTorch on the CPU.
        new_tokens: of every sequence.
        machine: what it reaches at its best.
        models, cells: the figures.
        noise: by cell, how far the first row is from itself; see `rounds`.
        slow: by cell, the matrices that take longer than dense there, where they were looked at.
        notes: sentences on what was left out, and why.
    """

    title: str
    device: str
    dtype: str
    attention: str
    threads: int
    new_tokens: int
    machine: MachineSpeed
    models: list[ModelFigures] = field(default_factory=list)
    cells: list[CellFigures] = field(default_factory=list)
    noise: dict[Cell, float] = field(default_factory=dict)
    slow: dict[Cell, list[SlowMatrix]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; what goes by cell has its batch and prompt in every entry."""
        values = asdict(replace(self, cells=[], noise={}, slow={}))
        values["cells"] = [
            {**asdict(found), "first_reached": found.first_reached, "gap_reached": found.gap_reached}
            for found in self.cells
        ]
        values["noise"] = [{**asdict(cell), "noise": noise} for cell, noise in self.noise.items()]
        values["slow"] = [
            {**asdict(cell), **asdict(matrix)} for cell, matrices in self.slow.items() for matrix in matrices
        ]
        return values

    def of(self, row: str, cell: Cell) -> CellFigures | None:
        """Return the figures of a row in a cell; None where it was left out."""
        return next((found for found in self.cells if found.row == row and found.cell == cell), None)


def figures(row: Row, cell: Cell, rounds: Rounds, cold: tuple[Timing, int | None], bound: Bound) -> CellFigures:
    """Return the figures of a row in a cell; `cold` has the first timing and the peak of memory."""
    timings = rounds.timings[row.name]
    compared: Mapping[str, float | None] = {}
    other = rounds.timings.get(row.against) if row.against is not None else None
    if other is not None:
        compared = {
            "first_times": first_token(other) / first_token(timings),
            "gap_times": per_token(other) / per_token(timings),
            "tokens_times": _rate(timings, cell) / _rate(other, cell),
        }
    return CellFigures(
        row.name,
        cell.batch,
        cell.prompt,
        first=first_token(timings),
        first_cold=cold[0].first,
        total_cold=cold[0].total,
        gap=per_token(timings),
        gap_p95=slow_token(timings),
        tokens_per_second=_rate(timings, cell),
        peak_bytes=cold[1],
        first_bound=bound.first,
        gap_bound=bound.gap,
        **compared,
    )


def _rate(timings: list[Timing], cell: Cell) -> float:
    """Tokens per second, of the median generation."""
    total = statistics.median(timing.total for timing in timings)
    return cell.batch * (len(timings[0].gaps) + 1) / total
