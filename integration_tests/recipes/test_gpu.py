"""The script of measurements on a GPU, on a CPU: what it writes, and that a step that hangs costs others nothing."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.benchmarks import gpu

ROOT = Path(__file__).parents[2]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_dry_run_goes_through_the_kernels_and_says_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    command = [
        sys.executable,
        "-m",
        "recipes.benchmarks.gpu",
        "--dry-run",
        "--steps",
        "correctness",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *found, last = lines(out)
    assert first["device"] == "cpu"
    assert len(found) == len(gpu.DRY.formats) * len(gpu.DRY.rows)
    assert all(line["right"] for line in found)
    assert last["done"]


def test_a_generation_is_compared_with_the_dense_one(tmp_path: Path) -> None:
    gpu.run_step("decode-pivoted", gpu.DRY, str(tmp_path / "out"))
    found = lines(tmp_path / "out")
    assert [line["model"] for line in found if "model" in line] == ["dense", "compressed"]
    dense, compressed = (line for line in found if "row" in line)
    assert dense["gap_times"] is None
    assert compressed["gap_times"] == pytest.approx(dense["gap"] / compressed["gap"])
    assert compressed["gap_reached"] == pytest.approx(compressed["gap_bound"] / compressed["gap"])


def test_pairs_are_timed_by_all_that_is_there(tmp_path: Path) -> None:
    gpu.run_step("pairs", gpu.DRY, str(tmp_path / "out"))
    _, *found = lines(tmp_path / "out")
    assert {(line["structure"], line["rows"]) for line in found} == {
        (structure, rows) for structure, *_ in gpu.DRY.formats for rows in gpu.DRY.rows
    }
    for line in found:
        assert all(line["microseconds"][name] > line["bound"] > 0 for name in ("library", "dense"))
        if importlib.util.find_spec("gemlite") is None:
            assert isinstance(line["microseconds"]["gemlite"], str)


@pytest.mark.parametrize("format", gpu.FORMATS)
def test_matrices_keep_the_bytes_asked_for(format: tuple[str, str, float]) -> None:
    structure, encoding, keep = format
    module, what = gpu.made(structure, encoding, keep, (768, 512), "cpu")
    size = sum(each.nbytes for each in module.parameters() if each.dim() > 1)
    assert 0.9 * keep < size / (2 * 768 * 512) <= keep
    x = torch.randn(3, 512).bfloat16()
    assert torch.equal(gpu.with_kernels(module)(x.float().repeat(9, 1).bfloat16()), module(x.repeat(9, 1)))
    assert what["rank"] % 16 == 0


def test_a_step_that_hangs_is_ended_and_later_ones_that_have_no_time_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def hang(command: list[str], timeout: float, **_: Any) -> None:
        limits.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    clock = iter([0.0, 0.0, 0.0, 50.0])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock, 97.0))
    args = argparse.Namespace(seconds=100, out=str(tmp_path / "out"), dry_run=False)
    assert gpu.run_all(["correctness", "pairs"], args) == 1
    one, other = lines(tmp_path / "out")
    assert limits == [gpu.STEPS["correctness"][0]]
    assert "ended at its limit" in one["why"]
    assert other == {"step": "pairs", "done": False, "why": "no time is left"}


def test_without_a_gpu_it_says_how_to_try_it_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no CUDA device; --dry-run" in capsys.readouterr().err
