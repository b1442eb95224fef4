"""The Triton kernels of `thin_product`: products of up to 16 rows, which take as long as reading the weights.

They have run in Triton's interpreter alone, and not yet on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _stored(found, scale, bias, at, where, there, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums (`rows x outputs`) with their scale, and the bias of the places they go to."""
    if HAS_SCALE:
        found *= tl.load(scale + at, mask=there, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        found += tl.load(bias + where, mask=there, other=0.0).to(tl.float32)[None, :]
    return found


@triton.jit
def _copied(x, bias, places, y, rows, inner, x_stride, y_stride, block, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Put `BLOCK` columns of `x` at their places."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    there = at < inner
    where = tl.load(places + at, mask=there, other=0).to(tl.int32)
    for row in range(rows):
        values = tl.load(x + row * x_stride + at, mask=there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            values += tl.load(bias + where, mask=there, other=0.0).to(tl.float32)
        tl.store(y + row * y_stride + where, values.to(y.dtype.element_ty), mask=there)


@triton.jit
def product_kernel(
    x,
    weight,
    scale,
    bias,
    places,
    y,
    sums,
    rows,
    outer,
    inner,
    x_stride,
    y_stride,
    tiles,
    steps,
    unit,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    WIDENED: tl.constexpr,
):
    """`y = x weight^T * unit * scale + bias`; where it is split, `sums` of its part of the inputs instead.

    One row is multiplied by the ordinary units, more (`BLOCK_ROWS` is 16 then) by the matrix units. Programs beyond
    the tiles copy `x` to its places. With `DEPENDENT` a program starts while the kernel before is still running, and
    waits for it before it first reads what that one wrote, which weights are not.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    if tile >= tiles:
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
        if split == 0:
            _copied(x, bias, places, y, rows, inner, x_stride, y_stride, tile - tiles, 1024, HAS_BIAS)
        return
    at_outer = tile * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)
    at_rows = tl.arange(0, BLOCK_ROWS)
    in_outer = at_outer < outer
    begin = split * steps * BLOCK_INNER
    of_weight = weight + at_outer[:, None].to(tl.int64) * inner
    if BLOCK_ROWS == 1:
        # The weights of a step are on their way while those of the one before are multiplied.
        end = tl.minimum(inner, begin + steps * BLOCK_INNER)
        at_inner = begin + tl.arange(0, BLOCK_INNER)
        there = in_outer[:, None] & (at_inner < end)[None, :]
        codes = tl.load(of_weight + at_inner[None, :], mask=there, other=0, eviction_policy="evict_first")
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
        products = tl.zeros((BLOCK_OUTER, BLOCK_INNER), dtype=tl.float32)
        for _ in range(steps):
            values = tl.load(x + at_inner, mask=at_inner < end, other=0.0)
            at_inner += BLOCK_INNER
            there = in_outer[:, None] & (at_inner < end)[None, :]
            coming = tl.load(of_weight + at_inner[None, :], mask=there, other=0, eviction_policy="evict_first")
            products += codes.to(tl.float32) * values.to(tl.float32)[None, :]
            codes = coming
        found = tl.sum(products, axis=1)[None, :]
    else:
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
        found = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), dtype=tl.float32)
        for step in range(steps):
            at_inner = begin + step * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
            in_inner = at_inner < inner
            codes = tl.load(
                of_weight + at_inner[None, :],
                mask=in_outer[:, None] & in_inner[None, :],
                other=0,
                eviction_policy="evict_first",
            )
            values = tl.load(
                x + at_rows[:, None] * x_stride + at_inner[None, :],
                mask=(at_rows[:, None] < rows) & in_inner[None, :],
                other=0.0,
            )
            if WIDENED:
                values = values.to(tl.float32)
            found += tl.dot(values, tl.trans(codes.to(values.dtype)), input_precision="ieee")
    found *= unit
    there = (at_rows[:, None] < rows) & in_outer[None, :]
    if SPLIT:
        at = (split * rows + at_rows[:, None]) * outer + at_outer[None, :]
        tl.store(sums + at, found, mask=there)
    else:
        where = at_outer
        if HAS_PLACES:
            where = tl.load(places + inner + at_outer, mask=in_outer, other=0).to(tl.int32)
        found = _stored(found, scale, bias, at_outer, where, in_outer, HAS_SCALE, HAS_BIAS)
        tl.store(y + at_rows[:, None] * y_stride + where[None, :], found.to(y.dtype.element_ty), mask=there)


@triton.jit
def sum_kernel(
    scale,
    bias,
    places,
    y,
    sums,
    rows,
    outer,
    inner,
    y_stride,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Add up what the splits of `product_kernel` found, always in the same order, and store it."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at_outer = tl.program_id(0) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)
    at_rows = tl.arange(0, BLOCK_ROWS)
    in_outer = at_outer < outer
    there = (at_rows[:, None] < rows) & in_outer[None, :]
    found = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), dtype=tl.float32)
    for split in range(splits):
        at = (split * rows + at_rows[:, None]) * outer + at_outer[None, :]
        found += tl.load(sums + at, mask=there, other=0.0)
    where = at_outer
    if HAS_PLACES:
        where = tl.load(places + inner + at_outer, mask=in_outer, other=0).to(tl.int32)
    found = _stored(found, scale, bias, at_outer, where, in_outer, HAS_SCALE, HAS_BIAS)
    tl.store(y + at_rows[:, None] * y_stride + where[None, :], found.to(y.dtype.element_ty), mask=there)
