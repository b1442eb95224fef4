"""How this machine's CPU multiplies, and what calibration does about it. Bundled with every checkpoint."""

from __future__ import annotations

import functools
from contextvars import ContextVar

import torch

WIDENED_FOR_SPEED: ContextVar[bool] = ContextVar("widened for speed", default=False)
"""Set while bfloat16 modules are computed in float32, since this CPU is faster so: no choice of the user's."""


@functools.cache
def has_bf16_products() -> bool:
    """Whether PyTorch multiplies bfloat16 by instructions of this x86 CPU."""
    # Private, and absent from older versions of PyTorch; without it the choice is only slower.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"
