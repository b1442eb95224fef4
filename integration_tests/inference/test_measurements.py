"""What was measured on a machine is not measured again, whatever becomes of the file that has it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration_tests.inference.compressed_models import compressed
from optimum_dobisvd import optimize_for_inference as optimized
from optimum_dobisvd.inference import cpu_linear, measured, measurements
from optimum_dobisvd.inference.measurements import FILE_VARIABLE, Ratios, keep, machine

KEY = ("low_rank", 64, 32, "cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a machine that has measured nothing yet."""
    path = tmp_path / "of" / "speeds.json"
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    return path


def in_another_process() -> None:
    """Forget what this one has read."""
    measurements._kept_by_machine.cache_clear()


def never() -> float:
    raise AssertionError("it was measured again")


def measured_as(ratio: float) -> Callable[[], float]:
    """Return a measurement."""
    return lambda: ratio


def test_another_process_does_not_measure_again(file: Path) -> None:
    first = Ratios("structure")
    assert first.of(KEY, measured_as(0.7)) == 0.7
    keep(first)
    in_another_process()
    assert Ratios("structure").of(KEY, never) == 0.7
    assert Ratios("columns").of(KEY, measured_as(0.9)) == 0.9  # something else with the same key


def test_what_several_processes_measure_is_kept_together(file: Path) -> None:
    ratios = Ratios("structure")
    ratios.of(KEY, measured_as(0.7))  # has looked into the file, which was not there
    file.parent.mkdir()
    theirs = {machine(): {"structure dense 1": 0.8}, "another machine": {"structure dense 1": 0.9}}
    file.write_text(json.dumps(theirs), encoding="utf-8")
    keep(ratios)
    in_another_process()
    assert Ratios("structure").of(KEY, never) == 0.7
    assert Ratios("structure").of(("dense", 1), never) == 0.8
    assert json.loads(file.read_text(encoding="utf-8"))["another machine"] == theirs["another machine"]


def test_what_is_set_counts(file: Path) -> None:
    ratios = Ratios("structure")
    ratios.of(KEY, measured_as(0.7))
    keep(ratios)
    in_another_process()
    ratios = Ratios("structure")
    ratios[KEY] = 2.0
    assert ratios.of(KEY, never) == 2.0
    keep(ratios)
    in_another_process()
    assert Ratios("structure").of(KEY, never) == 0.7  # and is nothing that was measured


def test_another_machine_measures_for_itself(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = Ratios("structure")
    ratios.of(KEY, measured_as(0.7))
    keep(ratios)
    in_another_process()
    monkeypatch.setattr(measurements, "machine", lambda: f"{machine()}, newer")
    other = Ratios("structure")
    assert other.of(KEY, measured_as(0.5)) == 0.5
    keep(other)
    assert len(json.loads(file.read_text(encoding="utf-8"))) == 2


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', "\x00\x01", '{"a": {"b": "much"}}'])
def test_a_file_of_something_else_is_said_and_replaced(
    text: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_text(text, encoding="utf-8")
    in_another_process()
    ratios = Ratios("structure")
    assert ratios.of(KEY, measured_as(0.7)) == 0.7
    assert f"{file} is no file of measured speeds" in caplog.text
    keep(ratios)
    in_another_process()
    assert Ratios("structure").of(KEY, never) == 0.7


def test_numbers_that_are_no_ratios_are_measured_anew(file: Path) -> None:
    ratios = Ratios("structure")
    for key, ratio in ((KEY, 0.7), (("b",), float("inf"))):
        ratios.of(key, measured_as(ratio))
    keep(ratios)
    stored = json.loads(file.read_text(encoding="utf-8"))
    assert list(stored[machine()].values()) == [0.7]
    file.write_text(json.dumps({machine(): dict.fromkeys(stored[machine()], -1)}), encoding="utf-8")
    in_another_process()
    assert Ratios("structure").of(KEY, measured_as(0.6)) == 0.6


def test_where_nothing_can_be_written_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "file" / "speeds.json"))
    ratios = Ratios("structure")
    ratios.of(KEY, measured_as(0.7))
    with caplog.at_level(logging.WARNING):
        keep(ratios)
    assert "measured speeds are not kept: " in caplog.text
    assert f"({FILE_VARIABLE}=PATH names another file)" in caplog.text
    assert ratios.of(KEY, never) == 0.7


def test_no_file_is_written_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, "")
    monkeypatch.setattr(measurements, "HF_HOME", str(tmp_path))
    ratios = Ratios("structure")
    ratios.of(KEY, measured_as(0.7))
    keep(ratios)
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv(FILE_VARIABLE)
    keep(ratios)
    assert (tmp_path / "dobisvd" / "speeds.json").exists()


def test_a_second_process_optimizes_without_measuring(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> None:
        monkeypatch.setattr(measured, "SPEEDS", Ratios("structure"))
        monkeypatch.setattr(cpu_linear, "BY_COLUMNS", Ratios("columns"))
        monkeypatch.setattr(measured, "BY_COLUMNS", cpu_linear.BY_COLUMNS)
        in_another_process()

    def running(model: Any) -> list[str]:
        return [type(module).__name__ for module in optimized(model, rows=(1, 64)).modules()]

    fresh()
    expected = running(compressed("pivoted", "float"))
    assert file.exists()
    fresh()
    monkeypatch.setattr(measured, "_measured", lambda *_: never())
    monkeypatch.setattr(cpu_linear, "ratio_by_turns", lambda *_: never())
    assert running(compressed("pivoted", "float")) == expected
