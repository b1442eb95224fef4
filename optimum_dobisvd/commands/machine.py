"""What this machine has: memory, disk, speed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
_GEMM_SIZE = 1024
_SVD_SIZE = 384


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
    path = Path(folder).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def measure_speed(dtype: torch.dtype, device: str | None = None) -> Speed:
    """Time products and SVDs for about a second."""
    place = torch.device(device or "cpu")
    products = {}
    for kind in (dtype, torch.float32):
        matrix = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=place).to(kind)
        products[kind] = 2 * _GEMM_SIZE**3 * _repetitions_per_second(lambda m=matrix: m @ m, place, 0.3)  # type: ignore[misc]
    matrix = torch.randn(_SVD_SIZE, _SVD_SIZE, dtype=torch.float64, device=place)
    svds = _SVD_SIZE**3 * _repetitions_per_second(lambda: torch.linalg.svd(matrix), place, 0.3)
    return Speed(products[dtype], products[torch.float32], svds)


def _repetitions_per_second(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    work()  # the first call loads libraries
    _wait(device)
    started, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started < seconds:
        work()
        _wait(device)
        count += 1
    return count / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
