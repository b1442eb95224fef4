"""`y = x (Q / 128)^T * scale` for an int8 matrix `Q`: one function, and a table of kernels to compute it with.

The first kernel of the table that takes the operands computes; none quantizes the activations. Bundled with every
checkpoint (see `checkpoint.bundle`): nothing but torch, and Triton where there is one.
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
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.compute import WIDENED_FOR_SPEED, has_bf16_products
from .triton_int8 import triton_int8_matmul, triton_is_outrun, triton_refuses

_kernel_log = logging.getLogger(__name__)

UNIT = 128
"""What an int8 integer is a fraction of."""

KERNEL_CALLS: Counter[str] = Counter()
"""How many products each kernel has computed in this process."""

# `_weight_int8pack_mm` reads beyond its operands where the inner dimension is no multiple of its vectors: with AVX2 of
# 8 (wrong results, then a segmentation fault), with AVX-512 of 16.
CPU_MULTIPLE = 16
# And with AVX-512 it crashes on operands at other addresses, as those in a mapped file are by the length of its head.
_CPU_ALIGNMENT = 64
_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_CACHED = 1 << 22
"""Elements that are unpacked at once on a CPU."""
# Above so many rows the bf16 instructions of newer CPUs beat it, unpacking included.
_CPU_FEW_ROWS = 12
_CPU_FUSED_ROWS = 4
"""Up to so many rows of float32, a compiler's loop over 8-bit weights is faster than a product with unpacked ones."""


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: as `KERNEL_CALLS` counts it and `using_kernel` takes it.
        device: the type of device it is for, None for any.
        refuses: `(x, weight) -> why it cannot compute these`, None where it can. The user is told once, since products
            are then slower than they need be.
        outrun: `(x, weight) -> whether the kernels after it are faster` on these.
        run: `(x, weight, scale) -> y` for a two-dimensional `x`.
    """

    name: str
    device: str | None
    refuses: Callable[[Tensor, Tensor], str | None]
    outrun: Callable[[Tensor, Tensor], bool]
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
    if name not in (kernel.name for kernel in KERNELS):
        raise ValueError(f"unknown kernel {name!r}; known: {', '.join(kernel.name for kernel in KERNELS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


_forced: ContextVar[str | None] = ContextVar("forced kernel", default=None)
_told: set[str] = set()
_broken: dict[str, str] = {}
"""Kernels that failed in this process, and how."""


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
    if torch.compiler.is_compiling():
        return _compiled_product(rows, weight, scale).view(*x.shape[:-1], len(weight))
    kernel = _choose(rows, weight)
    try:
        product = kernel.run(rows, weight, scale)
    except Exception as error:
        # A kernel compiled on the spot may find no C compiler, or a GPU it was never made for.
        if kernel.name != "triton" or _forced.get() is not None or isinstance(error, torch.OutOfMemoryError):
            raise
        _broken[kernel.name] = f"the Triton kernel failed: {error}"
        return _dispatch(x, weight, scale)
    KERNEL_CALLS[kernel.name] += 1
    return product.view(*x.shape[:-1], len(weight))


def _compiled_product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """What becomes part of a graph: the CPU kernel for few rows; else the compiler fuses unpacking into the product.

    Few rows of float32, which that kernel computes slowly, are a sum that a compiler makes one loop over the weights.

    Addresses are not known while a graph is made. The compiler's own buffers begin where the kernel can take them, and
    `Int8.for_inference` sees to it that slices do.
    """
    if x.device.type == "cpu" and x.dtype is torch.float32 and len(x) <= _CPU_FUSED_ROWS:
        product = (x[:, None, :] * weight.to(x.dtype)).sum(-1)
        return product * (1 / UNIT if scale is None else scale.to(x.dtype) / UNIT)
    few = len(x) <= _CPU_FEW_ROWS and x.dtype is torch.bfloat16 and x.shape[1] % CPU_MULTIPLE == 0
    if scale is None or scale.dtype is not x.dtype or not (few and x.device.type == "cpu" and _IS_X86):
        return _dequantizing(x, weight, scale)
    # Inductor's kernel takes a scale that is in memory, not one that it would have to compute.
    return torch._weight_int8pack_mm(x.contiguous(), weight, scale) * (1 / UNIT)


def _choose(x: Tensor, weight: Tensor) -> Kernel:
    forced = _forced.get()
    if forced is not None:
        return _checked(next(kernel for kernel in KERNELS if kernel.name == forced), x, weight)
    reasons = []
    for kernel in KERNELS[:-1]:
        if not _is_for(kernel, x):
            continue
        reason = _broken.get(kernel.name) or kernel.refuses(x, weight)
        if reason is None:
            if not kernel.outrun(x, weight):
                return kernel
        else:
            reasons.append(reason)
    if reasons:
        _tell("; ".join(reasons))
    return KERNELS[-1]


def _checked(kernel: Kernel, x: Tensor, weight: Tensor) -> Kernel:
    """The kernel; ValueError if it cannot compute these."""
    why = kernel.refuses(x, weight) if _is_for(kernel, x) else f"it is for {kernel.device}, these are on {x.device}"
    if why is not None:
        raise ValueError(f"the kernel {kernel.name!r} was asked for, and {why}")
    return kernel


def _is_for(kernel: Kernel, x: Tensor) -> bool:
    interpreted = kernel.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return kernel.device in (None, x.device.type) or interpreted


def _tell(why: str) -> None:
    """Say once why 8-bit weights are unpacked for every product."""
    if why not in _told:
        _told.add(why)
        _kernel_log.warning("8-bit weights are unpacked for every product, which is slow: %s", why)


def _unpacked(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(1 / UNIT)  # exact: 7 bits and a power of two


def _dequantizing(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        product = torch.nn.functional.linear(x, _unpacked(weight, x.dtype))
        return product if scale is None else product * scale.to(x.dtype)
    # Rows of the weight are unpacked by as many as stay in the cache until they are multiplied.
    product = x.new_empty(len(x), len(weight))
    count = min(max(1, _CACHED // weight.shape[1]), len(weight))
    unpacked = x.new_empty(count, weight.shape[1])
    for begin in range(0, len(weight), count):
        part = weight[begin : begin + count]
        rows = unpacked[: len(part)].copy_(part)
        if x.dtype is torch.float16:  # in which a sum of whole numbers would overflow; elsewhere the sum is divided
            rows.mul_(1 / UNIT)
        product[:, begin : begin + count] = torch.nn.functional.linear(x, rows)
    if x.dtype is not torch.float16:
        return product.mul_(1 / UNIT if scale is None else scale.to(x.dtype) / UNIT)
    return product if scale is None else product.mul_(scale)


def _cpu_refuses(x: Tensor, weight: Tensor) -> str | None:
    if not _IS_X86:
        return f"the int8 kernel was not tried on {platform.machine()}"
    if x.dtype not in (torch.bfloat16, torch.float16) and not WIDENED_FOR_SPEED.get():
        return f"the CPU kernel is for 16-bit activations, these are {x.dtype} (load with dtype=torch.bfloat16)"
    return None


def _cpu_is_outrun(x: Tensor, weight: Tensor) -> bool:
    if WIDENED_FOR_SPEED.get():
        return True
    return not x.numel() or (len(x) > _CPU_FEW_ROWS and x.dtype is torch.bfloat16 and has_bf16_products())


def _cpu_packed(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    missing = -x.shape[1] % CPU_MULTIPLE
    if missing:
        x, weight = torch.nn.functional.pad(x, (0, missing)), torch.nn.functional.pad(weight, (0, missing))
    # In float16 a scale over 128 could fall below the normal range; in bfloat16 it is exact.
    fused = scale is not None and x.dtype is torch.bfloat16
    factors = scale.to(x.dtype) / UNIT if fused else x.new_full((len(weight),), 1 / UNIT)  # type: ignore[union-attr]
    product = torch._weight_int8pack_mm(_aligned(x.contiguous()), _aligned(weight), factors)
    return product if fused or scale is None else product * scale.to(x.dtype)


def is_aligned(operand: Tensor) -> bool:
    """Whether a tensor on the CPU is at an address that the CPU kernel can take."""
    return operand.data_ptr() % _CPU_ALIGNMENT == 0


def _aligned(operand: Tensor) -> Tensor:
    """Return a tensor itself, or a copy at such an address."""
    return operand if is_aligned(operand) else operand.clone()


def _triton_refuses(x: Tensor, weight: Tensor) -> str | None:
    return triton_refuses(x) if _has_triton() else "Triton is not installed (pip install triton)"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


KERNELS = (
    Kernel("triton", "cuda", _triton_refuses, triton_is_outrun, triton_int8_matmul),
    Kernel("cpu_int8", "cpu", _cpu_refuses, _cpu_is_outrun, _cpu_packed),
    Kernel("dequantize", None, lambda x, weight: None, lambda x, weight: False, _dequantizing),
)
"""In the order in which they are asked; the last takes everything."""
