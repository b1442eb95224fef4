"""The most memory that a process, or its part of a GPU, held for a while."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass
class Peak:
    """Bytes; None where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device, base: int = 0) -> Iterator[Peak]:
    """Yield what has the most bytes held on the device when the block is through, less `base`.

    On a GPU those that PyTorch has allocated, on a CPU the resident set of this process (Linux alone tells its peak).
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.bytes = torch.cuda.max_memory_allocated() - base
        return
    try:
        _RESET.write_text(_RESET_PEAK)
    except OSError:
        yield found
        return
    yield found
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    found.bytes = 1024 * int(lines["VmHWM"].split()[0]) - base


def memory_held(device: torch.device) -> int:
    """Return the bytes that are held on the device now, as `peak_memory` counts them."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss
