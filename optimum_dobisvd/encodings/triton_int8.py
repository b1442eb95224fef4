"""The Triton kernel for products of few rows with int8 matrices: it reads every weight once, as a byte.

Its results are right on an H100. At 4096 x 4096, launched product by product, it is slower there than unpacking (0.27
against 0.20 ms for one row): both are times of launching, not of reading.

Bundled with every checkpoint. Triton is imported when it is first asked for, not before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

_MOST_ROWS = 128
_UNIT = 128


def triton_refuses(x: Tensor) -> str | None:
    """Why the kernel cannot compute with these activations, None if it can."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernel takes no activations of {x.dtype}"
    return None


def triton_is_outrun(x: Tensor, weight: Tensor) -> bool:
    """Whether unpacking once and a library's product should be faster."""
    return len(x) > _MOST_ROWS or not x.numel()


def triton_int8_matmul(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """`x (weight / 128)^T * scale` for `x` of `M x K`, `weight` of `N x K`.

    Few rows leave the time to reading the weight, so `K` is split among programs until there are enough of them to
    keep every multiprocessor reading; their float32 sums are added up in a fixed order.
    """
    triton, kernel = _compiled()
    rows, inner = x.shape
    outer = len(weight)
    x = x.contiguous()
    # Tiles of a size that fits into the shared memory of small GPUs, too, with the three stages of loads in flight.
    block_rows = min(max(16, triton.next_power_of_2(rows)), 32 if x.dtype is torch.float32 else 64)
    block_outer, block_inner = 32, 64 if x.dtype is torch.float32 else 128
    tiles = triton.cdiv(outer, block_outer) * triton.cdiv(rows, block_rows)
    steps = triton.cdiv(inner, block_inner)
    splits = max(1, min(steps, 2 * _multiprocessors(x.device) // tiles))
    steps_each = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, steps_each)
    sums = torch.empty((splits, rows, outer), device=x.device, dtype=torch.float32)
    # Triton launches on the current device, which need not be the one the tensors are on.
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        kernel[(triton.cdiv(outer, block_outer), triton.cdiv(rows, block_rows), splits)](
            x,
            weight,
            sums,
            rows,
            outer,
            inner,
            steps_each,
            BLOCK_ROWS=block_rows,
            BLOCK_OUTER=block_outer,
            BLOCK_INNER=block_inner,
            FLOAT32=os.environ.get("TRITON_INTERPRET") == "1",  # which takes the bits of bfloat16 for integers
        )
    found = sums[0] if splits == 1 else sums.sum(0)
    factors = 1 / _UNIT if scale is None else scale.float() / _UNIT
    return (found * factors).to(x.dtype)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """Triton and the kernel."""
    # By name, because transformers refuses a bundled file whose imports are not all installed, wherever they stand.
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")

    @triton.jit
    def matmul(
        x,
        weight,
        sums,
        rows,
        outer,
        inner,
        steps,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_OUTER: tl.constexpr,
        BLOCK_INNER: tl.constexpr,
        FLOAT32: tl.constexpr,
    ):
        at_outer = tl.program_id(0) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)
        at_rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        split = tl.program_id(2)
        found = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), dtype=tl.float32)
        for step in range(steps):
            at_inner = (split * steps + step) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
            values = tl.load(
                x + at_rows[:, None].to(tl.int64) * inner + at_inner[None, :],
                mask=(at_rows[:, None] < rows) & (at_inner[None, :] < inner),
                other=0.0,
            )
            bytes_ = tl.load(
                weight + at_outer[:, None].to(tl.int64) * inner + at_inner[None, :],
                mask=(at_outer[:, None] < outer) & (at_inner[None, :] < inner),
                other=0,
            )
            factors = tl.trans(bytes_.to(tl.float32))
            if FLOAT32:
                values = values.to(tl.float32)
            # ieee: of the input precisions only this one keeps float32 activations whole.
            found += tl.dot(values, factors.to(values.dtype), input_precision="ieee")
        tl.store(
            sums + (split.to(tl.int64) * rows + at_rows[:, None]) * outer + at_outer[None, :],
            found,
            mask=(at_rows[:, None] < rows) & (at_outer[None, :] < outer),
        )

    return triton, matmul
