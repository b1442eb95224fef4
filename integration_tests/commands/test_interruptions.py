"""Kills and Ctrl-C in the middle of `compress`, with the weights already written beside OUT."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from integration_tests.commands.cli_in_process import contents, dobisvd, names_in
from integration_tests.commands.conftest import COMPRESS

# The command as it is, but it stops for good before the plan is written: everything else lies in the staging folder.
STOPPING = """
import pathlib, sys, time
import optimum_dobisvd.report.write
def stop(folder, plan, report, pictures=True):
    pathlib.Path("reached").touch()
    time.sleep(600)
import optimum_dobisvd.quantizer  # has its own reference, for save_pretrained
optimum_dobisvd.report.write.write_beside = stop
from optimum.commands.optimum_cli import main
sys.argv = ["optimum-cli", "dobisvd", *sys.argv[1:]]
main()
"""
# And here while codes are learned, in the second block: nothing is written then.
LEARNING = """
import pathlib, sys, time
from optimum_dobisvd.encodings.learned_rounding import SignedDescent
take, steps = SignedDescent.step, []
def step(self, loss):
    steps.append(0)
    if len(steps) == 4:
        pathlib.Path("reached").touch()
        time.sleep(600)
    take(self, loss)
SignedDescent.step = step
from optimum.commands.optimum_cli import main
sys.argv = ["optimum-cli", "dobisvd", *sys.argv[1:]]
main()
"""
LEARNED = ["--quantization", "int8", "--rounding", "learned", "--rounding-settings", '{"steps": 3}']
ALWAYS = ["dense", "held-out.txt", "small", "text.txt"]


def start_and_wait(work: Path, code: str = STOPPING, *options: str) -> subprocess.Popen:
    """Start `compress` into the existing `small` and return when it has stopped in the middle."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *COMPRESS, "small", "--ratio", "0.5", *options],
        cwd=work,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A process started in the background by a shell ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 240
    while not (work / "reached").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"the command ended early: {process.communicate()[1][-2000:]}")
        time.sleep(0.05)
    (work / "reached").unlink()
    return process


def test_a_kill_leaves_the_old_output_and_the_next_run_tidies_up(work: Path) -> None:
    before = contents(work / "small")
    process = start_and_wait(work)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert contents(work / "small") == before
    left = [name for name in names_in(work) if name not in ALWAYS]
    assert len(left) == 1
    assert left[0].startswith(".small.saving-")
    assert (work / left[0] / "new" / "model.safetensors").exists(), "it was not killed in the middle"
    assert dobisvd(*COMPRESS, "small", "--ratio", "0.5") == 0
    assert names_in(work) == ALWAYS
    assert contents(work / "small")["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_ctrl_c_and_termination_leave_nothing(work: Path, number: signal.Signals, code: int) -> None:
    before = contents(work / "small")
    process = start_and_wait(work)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in error
    if number == signal.SIGINT:
        assert "interrupted" in error.splitlines()[-1]
    assert contents(work / "small") == before
    assert names_in(work) == ALWAYS


def test_a_run_that_goes_on_elsewhere_is_left_alone(work: Path) -> None:
    process = start_and_wait(work)
    try:
        assert dobisvd(*COMPRESS, "small", "--ratio", "0.5") == 0
        assert [name for name in names_in(work) if name.startswith(".small.saving-")]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_while_codes_are_learned_leaves_nothing_half_written(work: Path, number: signal.Signals) -> None:
    before = contents(work / "small")
    process = start_and_wait(work, LEARNING, *LEARNED)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert contents(work / "small") == before
    left = [name for name in names_in(work) if name not in ALWAYS]
    assert all(name.startswith(".small.") for name in left), left
    assert not left or number == signal.SIGKILL
    assert dobisvd(*COMPRESS, "small", "--ratio", "0.5", *LEARNED) == 0
    assert names_in(work) == ALWAYS, "the next run tidies up"
