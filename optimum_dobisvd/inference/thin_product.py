"""Products of up to 16 rows as one operator of PyTorch: 16-bit or int8 weights, scale, bias and places in one pass.

Two of them are a factorized matrix: the second reads what the first gives and stores all outputs where they belong.
Written for decoding on Hopper GPUs. It has run in Triton's interpreter alone, and not yet on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..encodings.int8_matmul import UNIT

MOST_ROWS = 16
"""What one tile of the matrix units holds. More rows are a library's business."""
_COPIED = 1024
_SUMMED = 128


@dataclass(frozen=True)
class Tile:
    """What one program computes.

    Attributes:
        outer: outputs.
        inner: inputs in a step.
        warps: that share it.
        stages: steps whose weights are on their way.
        fills: whether inputs are split among programs until every multiprocessor has two; sums are added up by another
            kernel then.
    """

    outer: int
    inner: int
    warps: int
    stages: int = 3
    fills: bool = False


ONE_ROW = (Tile(2, 2048, 4), Tile(4, 1024, 4), Tile(8, 512, 4), Tile(4, 1024, 4, fills=True))
SEVERAL_ROWS = (Tile(32, 128, 4, 4, fills=True), Tile(16, 128, 2, 4), Tile(16, 256, 2, 3, fills=True))
"""Few: each is compiled once, and all are timed for every shape. The first is taken where nothing was timed."""

TILES: dict[tuple[Any, ...], Tile] = {}
"""The fastest by all that decides it (see `tile_key`)."""


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why there are no such products with activations of that dtype, None if there are."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda" and not _interpreted():
        return f"the kernels are for GPUs, and the model is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels are for 16-bit activations, these are {dtype}"
    return None


def choices(rows: int) -> tuple[Tile, ...]:
    """Return the tiles to choose from."""
    return ONE_ROW if rows == 1 else SEVERAL_ROWS


def tile_key(rows: int, weight: Tensor) -> tuple[Any, ...]:
    """Return by what `TILES` has the tile of a product."""
    return (rows == 1, *weight.shape, weight.dtype, weight.device)


_SCHEMA = "(Tensor x, Tensor weight, Tensor? scale=None, Tensor? bias=None, Tensor? places=None) -> Tensor"


@torch.library.custom_op("dobisvd::thin_product", mutates_args=(), schema=_SCHEMA)
def thin_product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """`x weight^T * scale + bias`, sums in float32, always in the same order.

    Args:
        x: `M x K`, of at most 16 rows, bfloat16 or float16; rows may lie apart.
        weight: `N x K`, contiguous, in the dtype of `x` or int8, whose integers are fractions of 128.
        scale: `N`; None is 1.
        bias: one value an output.
        places: where the `K` columns of `x`, and behind them the `N` products, go among `K + N` outputs; None: the
            products alone are the outputs.

    Returns:
        `M x N`, or `M x (K + N)`.
    """
    rows = len(x)
    y = x.new_empty(rows, len(weight) if places is None else len(places))
    if y.numel():
        tile = TILES.get(tile_key(rows, weight), choices(rows)[0])
        _launch(y, (x if x.stride(1) == 1 else x.contiguous(), weight, scale, bias, places), tile)
    return y


@thin_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Any = None, bias: Any = None, places: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] if places is None else places.shape[0])


def _launch(y: Tensor, operands: tuple[Tensor | None, ...], tile: Tile) -> None:
    x, weight, scale, bias, places = operands
    assert x is not None
    assert weight is not None
    kernels: Any = importlib.import_module(".thin_kernels", __package__)
    rows, (outer, inner) = len(x), weight.shape
    block_rows = 1 if rows == 1 else MOST_ROWS
    inner_block = min(tile.inner, max(32, _next_power_of_2(inner)))
    tiles, steps = _parts(outer, tile.outer), max(1, _parts(inner, inner_block))
    wanted = 2 * _multiprocessors(x.device) // max(1, tiles) if tile.fills else 1
    steps_each = _parts(steps, max(1, min(steps, wanted)))
    splits = _parts(steps, steps_each)
    copies = 0 if places is None else _parts(inner, _COPIED)
    sums = x.new_empty(splits, rows, outer, dtype=torch.float32) if splits > 1 else y
    has = {"HAS_SCALE": scale is not None, "HAS_BIAS": bias is not None, "HAS_PLACES": places is not None}
    # A kernel is given a pointer for what it does not read.
    scale, bias, places = (y if each is None else each for each in (scale, bias, places))
    unit = 1 / UNIT if weight.dtype is torch.int8 else 1.0
    how: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages, "DEPENDENT": False}
    if _can_depend(x.device):
        how |= {"DEPENDENT": True, "launch_pdl": True}
    # Triton launches on the current device, which need not be the one the tensors are on.
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        kernels.product_kernel[(tiles + copies, splits)](
            *(x, weight, scale, bias, places, y, sums, rows, outer, inner, x.stride(0), y.stride(0)),
            *(tiles, steps_each, unit),
            BLOCK_ROWS=block_rows,
            BLOCK_OUTER=tile.outer,
            BLOCK_INNER=inner_block,
            SPLIT=splits > 1,
            WIDENED=_interpreted(),  # the interpreter takes the bits of bfloat16 for integers
            **has,
            **how,
        )
        if splits > 1:
            kernels.sum_kernel[(_parts(outer, _SUMMED),)](
                *(scale, bias, places, y, sums, rows, outer, inner, y.stride(0), splits),
                BLOCK_ROWS=block_rows,
                BLOCK_OUTER=_SUMMED,
                **has,
                **how,
            )


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _can_depend(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it is running: Hopper and newer, and a Triton that knows it."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    cuda = importlib.import_module("triton.language.extra.cuda")
    options = importlib.import_module("triton.backends.nvidia.compiler").CUDAOptions
    return hasattr(cuda, "gdc_wait") and hasattr(options, "launch_pdl")
