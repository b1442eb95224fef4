"""`y = x (Q / 128)^T * scale` for an int8 matrix `Q`: one function, and a table of kernels to compute it with.

The first kernel of the table that takes the operands computes; none quantises the activations. Bundled with every
checkpoint (see `integrations.saving`): nothing but torch, and Triton where there is one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..storage.eight_bit import UNIT
from .triton_int8 import triton_int8_matmul, triton_refuses

logger = logging.getLogger(__name__)

KERNEL_CALLS: Counter[str] = Counter()
"""How many products each kernel has computed in this process."""

# `_weight_int8pack_mm` reads beyond its operands where the inner dimension is no multiple of its vectors: with AVX2 of
# 8 (wrong results, then a segmentation fault), with AVX-512 of 16.
_CPU_MULTIPLE = 16
# Above so many rows the bf16 instructions of newer CPUs beat it, unpacking included.
_CPU_FEW_ROWS = 12


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: as `KERNEL_CALLS` counts it and `using_kernel` takes it.
        refuses: `(x, weight) -> why not`, None where it can compute them. What it says is told to the user once, if it
            is why products are slower than they need be; an empty string is a reason of speed, and not told.
        run: `(x, weight, scale) -> y` for a two-dimensional `x`.
    """

    name: str
    refuses: Callable[[Tensor, Tensor], str | None]
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """`x (weight / 128)^T * scale`, in the dtype of `x`.

    Differentiable by `x`; the weight and its scale are constants.

    Args:
        x: `... x K`, floating point.
        weight: `N x K`, int8, contiguous.
        scale: `N`, floating point; None is 1.

    Returns:
        `... x N`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Int8Matmul.apply(x, weight, scale)
    return _dispatch(x, weight, scale)


@contextlib.contextmanager
def using_kernel(name: str) -> Iterator[None]:
    """Compute with this kernel and no other, also where another is faster.

    Raises:
        ValueError: there is no such kernel; inside, it cannot take the operands (says why).
    """
    global _forced
    if name not in (kernel.name for kernel in KERNELS):
        raise ValueError(f"unknown kernel {name!r}; known: {', '.join(kernel.name for kernel in KERNELS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


_forced: str | None = None
_told: set[str] = set()


class _Int8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return _dispatch(x, weight, scale)

    @staticmethod
    def backward(ctx, gradient):
        weight, scale = ctx.saved_tensors
        if scale is not None:
            gradient = gradient * scale.to(gradient.dtype)
        return gradient @ _unpacked(weight, gradient.dtype), None, None


def _dispatch(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    kernel = _choose(rows, weight)
    if not torch.compiler.is_compiling():
        KERNEL_CALLS[kernel.name] += 1
    return kernel.run(rows, weight, scale).view(*x.shape[:-1], len(weight))


def _choose(x: Tensor, weight: Tensor) -> Kernel:
    if torch.compiler.is_compiling():
        return KERNELS[-1]  # the compiler fuses the unpacking into the product
    reasons: list[str | None] = []
    for kernel in KERNELS:
        reason = kernel.refuses(x, weight)
        if _forced is not None and kernel.name == _forced:
            if reason:
                raise ValueError(f"the kernel {_forced!r} was asked for, and {reason}")
            return kernel
        if _forced is None and reason is None:
            if kernel is KERNELS[-1]:
                _tell([each for each in reasons if each])
            return kernel
        reasons.append(reason)
    raise AssertionError("the last kernel takes everything")


def _tell(reasons: list[str]) -> None:
    """Say once why 8-bit weights are unpacked for every product."""
    message = "; ".join(reasons)
    if message and message not in _told:
        _told.add(message)
        logger.warning("8-bit weights are unpacked for every product, which is slow: %s", message)


def _unpacked(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(1 / UNIT)  # exact: 7 bits and a power of two


def _dequantizing(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    product = torch.nn.functional.linear(x, _unpacked(weight, x.dtype))
    return product if scale is None else product * scale.to(x.dtype)


def _cpu_refuses(x: Tensor, weight: Tensor) -> str | None:
    if x.device.type != "cpu":
        return ""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the int8 kernel was not tried on {platform.machine()}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the CPU kernel is for 16-bit activations, these are {x.dtype} (load with dtype=torch.bfloat16)"
    if not x.numel():
        return ""
    if _forced is None and len(x) > _CPU_FEW_ROWS and x.dtype is torch.bfloat16 and _has_bf16_products():
        return ""
    return None


@functools.cache
def _has_bf16_products() -> bool:
    # Private, and absent from older versions of PyTorch; without it the choice is only slower.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _cpu_packed(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    missing = -x.shape[1] % _CPU_MULTIPLE
    if missing:
        x, weight = torch.nn.functional.pad(x, (0, missing)), torch.nn.functional.pad(weight, (0, missing))
    # In float16 a scale over 128 could fall below the normal range; in bfloat16 it is exact.
    fused = scale is not None and x.dtype is torch.bfloat16
    factors = scale.to(x.dtype) / UNIT if fused else x.new_full((len(weight),), 1 / UNIT)  # type: ignore[union-attr]
    product = torch._weight_int8pack_mm(x.contiguous(), weight, factors)
    return product if fused or scale is None else product * scale.to(x.dtype)


def _triton_refuses(x: Tensor, weight: Tensor) -> str | None:
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return ""
    return triton_refuses(x, weight) if _has_triton() else "Triton is not installed (pip install triton)"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


KERNELS = (
    Kernel("triton", _triton_refuses, triton_int8_matmul),
    Kernel("cpu_int8", _cpu_refuses, _cpu_packed),
    Kernel("dequantize", lambda x, weight: None, _dequantizing),
)
"""In the order in which they are asked."""
