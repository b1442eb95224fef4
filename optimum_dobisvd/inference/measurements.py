"""Ratios of times measured on this machine, kept in a file: another process need not measure them again."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from ..atomic_files import write_text_atomically

logger = logging.getLogger(__name__)

FILE_VARIABLE = "DOBISVD_SPEEDS"
"""Environment variable with the path of the file; empty: nothing is kept. Delete the file to measure anew."""


class Ratios(dict[tuple[Any, ...], float]):
    """Ratios of times by all that decides them. To override a measurement, set it here.

    Attributes:
        measured: in this process, by their names in the file.
    """

    def __init__(self, what: str) -> None:
        """`what` names them in the file."""
        super().__init__()
        self._what = what
        self.measured: dict[str, float] = {}

    def of(self, key: tuple[Any, ...], measure: Callable[[], float]) -> float:
        """Return the ratio of a key: what is set, what is in the file, or what `measure` returns."""
        if key not in self:
            kept = _kept_by_machine(_path()).get(machine(), {}).get(self._name(key))
            self[key] = measure() if kept is None else kept
            if kept is None and math.isfinite(self[key]):
                self.measured[self._name(key)] = self[key]
        return self[key]

    def _name(self, key: tuple[Any, ...]) -> str:
        return " ".join(map(str, (self._what, *key)))


def keep(*ratios: Ratios) -> None:
    """Write what was measured to the file, beside what other processes wrote. What cannot be written is not kept."""
    path = _path()
    new = {name: ratio for each in ratios for name, ratio in each.measured.items()}
    if path is None or new.items() <= _kept_by_machine(path).get(machine(), {}).items():
        return
    _kept_by_machine.cache_clear()
    machines = _kept_by_machine(path)
    machines[machine()] = machines.get(machine(), {}) | new
    try:
        write_text_atomically(path, json.dumps(machines, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        logger.warning("measured speeds are not kept: %s (%s=PATH names another file)", error, FILE_VARIABLE)


@functools.cache
def machine() -> str:
    """Return what measurements are of: processors and the libraries that compute."""
    from .. import __version__

    gpus = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return ", ".join([_processor(), *sorted(gpus), f"torch {torch.__version__}", f"optimum-dobisvd {__version__}"])


def _processor() -> str:
    """Model and instructions of the CPU where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.processor())
    return f"{model} {torch.backends.cpu.get_cpu_capability()} x {os.cpu_count()}"


def _path() -> Path | None:
    path = os.environ.get(FILE_VARIABLE, str(Path(HF_HOME) / "dobisvd" / "speeds.json"))
    return Path(path) if path else None


@functools.cache
def _kept_by_machine(path: Path | None) -> dict[str, dict[str, float]]:
    """What the file has; nothing where there is none, or it is not one of these."""
    if path is None or not path.exists():
        return {}
    try:
        machines = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): {str(key): float(ratio) for key, ratio in ratios.items() if 0 < float(ratio) < math.inf}
            for name, ratios in machines.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("%s is no file of measured speeds, which are measured anew: %s", path, error)
        return {}
