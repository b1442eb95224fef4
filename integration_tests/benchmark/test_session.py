"""A benchmark from beginning to end, of models that are not there."""

from typing import Any

import pytest
import torch

from optimum_dobisvd.benchmark.bounds import MachineSpeed, Traffic
from optimum_dobisvd.benchmark.generation import Cell, Timing
from optimum_dobisvd.benchmark.matrices import MatrixTime
from optimum_dobisvd.benchmark.result import Row, SpeedReport
from optimum_dobisvd.benchmark.rounds import Patience
from optimum_dobisvd.benchmark.session import Session
from optimum_dobisvd.benchmark.worker import Cold, Loaded, OutOfMemory
from optimum_dobisvd.report.speed import slower_lines
from optimum_dobisvd.report.speed_picture import speed_picture

SMALL, LARGE = Cell(1, 32), Cell(16, 512)
TRAFFIC = Traffic(weight_bytes=1000, macs=500, head_macs=100, cache_bytes=10, attention_macs=2)


class Stand:
    """A worker whose model takes as long as it is told."""

    def __init__(self, name: str, first: float, gap: float, **settings: Any) -> None:
        self.name, self.timing = name, Timing(first, (gap, gap))
        self.settings = settings
        self.calls: list[tuple[Any, ...]] = []

    def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append((method, *arguments))
        return getattr(self, method)(*arguments)

    def load(self) -> Loaded:
        return Loaded(2.0, 1.0, 1000, torch.bfloat16, self.settings.get("offloaded", False))

    def machine(self, dtype: torch.dtype) -> MachineSpeed:
        return MachineSpeed(1e6, 1e9)

    def traffic(self) -> Traffic:
        return TRAFFIC

    def free(self) -> None:
        pass

    def matrices(self) -> list[str]:
        return ["layers.0.k_proj", "layers.1.k_proj", "layers.0.q_proj"]

    def cold(self, cell: Cell, compiled: bool) -> Cold:
        if cell == self.settings.get("too_large"):
            raise OutOfMemory("out of memory")
        if compiled and self.settings.get("breaks"):
            raise RuntimeError("no such kernel")
        return Cold(Timing(9.0, (1.0, 1.0)), 5000)

    def run(self, cell: Cell, compiled: bool) -> Timing:
        return self.timing

    def matrix_times(self, names: list[str], cell: Cell) -> dict[str, MatrixTime]:
        slow = 3.0 if self.name == "checkpoint" else 1.0
        return {name: MatrixTime(0.001, 0.001 * (slow if "k_proj" in name else 1)) for name in names}


ROWS = (
    Row("dense", "dense"),
    Row("dense-compiled", "dense", compiled=True),
    Row("checkpoint", "checkpoint", against="dense"),
    Row("compiled", "checkpoint", compiled=True, against="dense-compiled"),
)


def session(dense: Stand, checkpoint: Stand, **settings: Any) -> Session:
    return Session(
        {"dense": dense, "checkpoint": checkpoint},
        list(ROWS),
        [SMALL, LARGE],
        3,
        Patience(rounds=3),
        **{"refuse": lambda cell: None, "tell": lambda line: None, **settings},
    )


def empty(machine: MachineSpeed, loaded: Loaded) -> SpeedReport:
    return SpeedReport("small", "cpu", "bfloat16", "sdpa", 2, 3, machine)


def test_every_row_has_its_figures_in_every_cell(tmp_path) -> None:
    dense, checkpoint = Stand("dense", 1.0, 0.1), Stand("checkpoint", 0.5, 0.2)
    report = session(dense, checkpoint).run(empty)
    assert [(found.row, found.cell) for found in report.cells] == [
        (row.name, cell) for cell in (SMALL, LARGE) for row in ROWS
    ]
    found = report.of("checkpoint", LARGE)
    assert (found.first, found.gap, found.gap_p95) == (0.5, 0.2, 0.2)
    assert (found.first_times, found.gap_times) == (2.0, 0.5)
    assert found.tokens_per_second == pytest.approx(16 * 3 / 0.9)
    assert found.tokens_times == pytest.approx(1.2 / 0.9)
    assert (found.first_cold, found.total_cold, found.peak_bytes) == (9.0, 11.0, 5000)
    moved = 1000 + 16 * (512 + 1.5) * 10
    assert found.gap_reached == pytest.approx(moved / 1e6 / 0.2)
    assert report.of("dense", SMALL).first_times is None
    assert report.noise == {SMALL: 0, LARGE: 0}
    assert [(each.name, each.load_cold, each.load_warm) for each in report.models] == [
        ("dense", 2.0, 1.0),
        ("checkpoint", 2.0, 1.0),
    ]
    # Those that compile come last, the longest prompts first.
    colds = [call[1:] for call in dense.calls if call[0] == "cold"]
    assert colds == [(LARGE, False), (SMALL, False), (LARGE, True), (SMALL, True)]
    values = report.to_dict()
    assert (values["cells"][6]["row"], values["cells"][6]["gap_reached"]) == ("checkpoint", found.gap_reached)
    assert values["noise"] == [{"batch": 1, "prompt": 32, "noise": 0}, {"batch": 16, "prompt": 512, "noise": 0}]
    assert speed_picture(report, tmp_path / "speed.png").stat().st_size > 1000


def test_it_says_where_it_is_slower_and_which_matrices_make_it_so() -> None:
    report = session(Stand("dense", 1.0, 0.1), Stand("checkpoint", 0.5, 0.2)).run(empty)
    assert {each.name for each in report.slow[SMALL]} == {"layers.0.k_proj", "layers.1.k_proj"}
    lines = slower_lines(report)
    assert lines[0] == (
        "slower than dense: checkpoint, batch 1, prompt 32, decode: 0.50 ×; k_proj (2 matrices, +4.00 ms a token)"
    )
    assert len(lines) == 4, "checkpoint and compiled, in two cells"
    assert not any("first token" in line for line in lines)


def test_where_it_is_slower_nowhere_it_says_so_and_names_matrices_that_are() -> None:
    report = session(Stand("dense", 1.0, 0.1), Stand("checkpoint", 0.5, 0.05)).run(empty)
    assert slower_lines(report) == [
        "nowhere slower than dense, noise aside",
        "at batch 1, prompt 32 these matrices alone take longer than dense: k_proj (2 matrices, +4.00 ms a token)",
    ]


def test_a_cell_that_is_noise_is_not_judged() -> None:
    dense = Stand("dense", 1.0, 0.1)
    gaps = iter(range(1, 10**6))
    dense.run = lambda cell, compiled: Timing(1.0, (next(gaps) ** 2, 1.0))  # type: ignore[method-assign]
    report = session(dense, Stand("checkpoint", 5.0, 5.0)).run(empty)
    assert slower_lines(report) == []
    assert any("batch 1, prompt 32: cannot tell: dense against itself differs by" in note for note in report.notes)


def test_what_does_not_fit_is_left_out_in_words_and_the_rest_is_measured() -> None:
    report = session(Stand("dense", 1.0, 0.1, too_large=LARGE), Stand("checkpoint", 0.5, 0.05)).run(empty)
    assert [found.row for found in report.cells if found.cell == LARGE] == ["checkpoint", "compiled"]
    assert report.of("checkpoint", LARGE).gap_times is None
    assert report.of("checkpoint", SMALL).gap_times == pytest.approx(2.0)
    assert "dense, batch 16, prompt 512: does not fit: out of memory" in report.notes
    refused = session(
        Stand("dense", 1.0, 0.1),
        Stand("checkpoint", 0.5, 0.05),
        refuse=lambda cell: "it takes 9 GB" if cell == LARGE else None,
    ).run(empty)
    assert {found.cell for found in refused.cells} == {SMALL}
    assert refused.notes == ["batch 16, prompt 512: left out: it takes 9 GB"]
    with pytest.raises(ValueError, match="nothing could be measured: batch 1, prompt 32: left out: it is too much"):
        session(Stand("dense", 1, 1), Stand("checkpoint", 1, 1), refuse=lambda cell: "it is too much").run(empty)


def test_what_fits_no_more_when_it_is_measured_is_left_out_in_words() -> None:
    checkpoint = Stand("checkpoint", 0.5, 0.05)

    def run(cell: Cell, compiled: bool) -> Timing:
        if cell == LARGE:
            raise OutOfMemory("out of memory")
        return checkpoint.timing

    checkpoint.run = run  # type: ignore[method-assign]
    dense = Stand("dense", 1.0, 0.1)
    report = session(dense, checkpoint).run(empty)
    assert {found.cell for found in report.cells} == {SMALL}
    assert "batch 16, prompt 512: left out: it did not fit beside the other models: out of memory" in report.notes
    assert dense.calls[-1][0] == "matrix_times"
    assert dense.calls.count(("free",)) >= 2, "what is not used is given back before it is tried once more"


def test_what_does_not_compile_or_is_offloaded_is_not_compiled() -> None:
    report = session(Stand("dense", 1.0, 0.1, offloaded=True), Stand("checkpoint", 0.5, 0.05, breaks=True)).run(empty)
    assert {found.row for found in report.cells} == {"dense", "checkpoint"}
    assert report.notes == [
        "dense-compiled: left out, since weights of dense are offloaded",
        "compiled: left out, since it does not compile: no such kernel",
    ]
