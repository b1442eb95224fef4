"""Memory, disk and speed of this machine."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
_GEMM_SIZE = 1024
_SVD_SIZE = 512


@dataclass(frozen=True)
class Speed:
    """Floating-point operations per second: matrix products in the model's dtype and in float32, SVDs in float64.

    An SVD of `m x n` counts as `m n min(m, n)` operations.
    """

    model_products: float
    float32_products: float
    float64_svds: float


def available_memory() -> int:
    """Bytes of memory that can be had without swapping; a container's limit counts."""
    available = psutil.virtual_memory().available
    try:
        limit, used = int(_CGROUP_LIMIT.read_text()), int(_CGROUP_USED.read_text())
    except (OSError, ValueError):  # no such limit: the file is missing, or says "max"
        return available
    return max(0, min(available, limit - used))


def available_device_memory(device: str) -> int | None:
    """Free bytes on a CUDA device; None where there is none to ask."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(torch.device(device))[0]


def available_disk(folder: str) -> int:
    """Free bytes where this folder is or would be."""
    return shutil.disk_usage(_existing(folder)).free


def by_disk(folders: Iterable[str]) -> list[list[str]]:
    """The folders, those on one disk together."""
    found: dict[int, list[str]] = {}
    for folder in folders:
        found.setdefault(_existing(folder).stat().st_dev, []).append(folder)
    return list(found.values())


def _existing(folder: str) -> Path:
    path = Path(folder).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def measure_speed(dtype: torch.dtype, device: str | None = None) -> Speed:
    """Time products and SVDs for about a second."""
    place = torch.device(device or "cpu")
    square = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=place)
    small = torch.randn(_SVD_SIZE, _SVD_SIZE, dtype=torch.float64, device=place)
    return Speed(
        model_products=2 * _GEMM_SIZE**3 * _best_rate(_product, square.to(dtype), 0.25),
        float32_products=2 * _GEMM_SIZE**3 * _best_rate(_product, square, 0.25),
        float64_svds=_SVD_SIZE**3 * _best_rate(torch.linalg.svd, small, 0.5),
    )


def _product(matrix: Tensor) -> Tensor:
    return matrix @ matrix


def _best_rate(work: Callable[[Tensor], Any], matrix: Tensor, seconds: float) -> float:
    """Repetitions per second at their fastest: what else the machine does now says nothing about later."""
    work(matrix)  # the first call loads libraries
    _wait(matrix.device)
    begun, fastest = time.perf_counter(), math.inf
    while fastest == math.inf or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        work(matrix)
        _wait(matrix.device)
        fastest = min(fastest, time.perf_counter() - started)
    return 1 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
