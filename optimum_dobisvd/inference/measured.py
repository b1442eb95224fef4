"""In which structure a matrix is fastest on this machine: measured once for every shape."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..encodings.base import Encoding
from ..encodings.registry import encoding_named
from ..structures.base import CompressedLinear
from ..structures.low_rank import LowRankLinear
from ..structures.pivoted import PivotedLinear
from .cpu_linear import faster_on_cpu, runs_as_loop
from .device_time import cold_copies, ratio_by_turns, seconds_of
from .thin_linear import faster_by_kernel

_CLEARLY = 1.05
"""How much faster another structure must be than its own: what two equal products may differ by."""
_MANY_ROWS = 2048
"""Products of more rows are as much faster or slower than dense ones."""
_RANK_STEP = 16

SPEEDS: dict[tuple[Any, ...], float] = {}
"""Times of a matrix in a structure over dense times, by all that decides them. To override one, set it here."""


def fastest_structures(together: Sequence[CompressedLinear], rows: Sequence[int], compiled: bool) -> list[str]:
    """Return the structures in which matrices are fastest over products of all these `rows`: their own, or others.

    `low_rank` is for a pivoted one where two factors give its outputs in order sooner than they can be put in order.
    Matrices that read one input are all dense or none: only those that are alike can be joined to one product.
    """
    found, total, dense = [], 0.0, 0
    for module in together:
        time, fastest = _time_of(type(module), module, rows, compiled), type(module)
        for kind in _others(module):
            other = _time_of(kind, module, rows, compiled)
            if other * _CLEARLY < time:
                time, fastest = other, kind
        found.append(fastest.structure)
        total += time * module.out_features * module.in_features
        dense += module.out_features * module.in_features
    return ["dense"] * len(found) if total > _CLEARLY * dense else found


def _others(module: CompressedLinear) -> list[type[CompressedLinear]]:
    """Structures with a rank that such a matrix could be computed in as well."""
    # On GPUs the second linear's kernel stores its outputs to their places.
    return [LowRankLinear] if isinstance(module, PivotedLinear) and module.weight.device.type == "cpu" else []


def _time_of(kind: type[CompressedLinear], module: CompressedLinear, rows: Sequence[int], compiled: bool) -> float:
    """The time of a matrix in that structure over a dense one's, over all `rows`.

    Loops of a compiler are not measured: they take as long as reading the weights, where dense products take longer.
    """
    dtype, device = module.weight.dtype, module.weight.device
    shape = (module.out_features, module.in_features)
    numbers = sum(math.prod(each) for each in kind.linears(*shape, module.rank).values())
    fewer = numbers / math.prod(shape)
    ratios = [
        fewer if compiled and runs_as_loop(dtype, device, count) else _ratio(kind, module, count) for count in rows
    ]
    return math.exp(statistics.fmean(map(math.log, ratios)))


def faster_linear(
    linear: Any, encoding: Encoding, rows: Sequence[int], places: torch.Tensor | None, compiled: bool
) -> nn.Module | None:
    """Return what is measured to be faster than a single linear as it is, at that many rows; None if nothing is.

    Args:
        linear: with its values, on its device.
        encoding: its own.
        rows: of one product; over all of them it is faster.
        places: where its inputs and outputs go, if they go together.
        compiled: whether it is to run in a compiled graph.
    """
    return faster_by_kernel(linear, encoding, rows, places) or faster_on_cpu(linear, encoding, rows, compiled)


def speed_key(module: CompressedLinear, rows: int, kind: type[CompressedLinear] | None = None) -> tuple[Any, ...]:
    """Return by what `SPEEDS` has the speed of such a matrix, in its own structure or another one.

    Ranks that differ little count as one, and so do numbers of rows that are large.
    """
    structure, rank = (kind or type(module)).structure, _nearby_rank(module)
    shape = (structure, module.encoding, module.out_features, module.in_features, rank)
    return (*shape, min(rows, _MANY_ROWS), module.weight.dtype, module.weight.device, torch.get_num_threads())


def _nearby_rank(module: CompressedLinear) -> int | None:
    """The rank that is measured for a matrix: one of eight between a power of 2 and the next, multiples of 16."""
    if module.rank is None:
        return None
    step = max(_RANK_STEP, (1 << module.rank.bit_length()) // 16)
    nearby = round(module.rank / step) * step
    return nearby if 0 < nearby < min(module.out_features, module.in_features) else module.rank


def _ratio(kind: type[CompressedLinear], module: CompressedLinear, rows: int) -> float:
    key = speed_key(module, rows, kind)
    if key not in SPEEDS:
        SPEEDS[key] = _measured(kind, module, min(rows, _MANY_ROWS))
    return SPEEDS[key]


@torch.no_grad()
def _measured(kind: type[CompressedLinear], module: CompressedLinear, rows: int) -> float:
    """The time of a matrix like this one in that structure over that of a dense one."""
    device, dtype = module.weight.device, module.weight.dtype
    inputs, outputs = module.in_features, module.out_features
    count = cold_copies(inputs * outputs * dtype.itemsize, device)
    dense = [_filled(nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype), device) for _ in range(count)]
    ours = [_like(kind, module, rows) for _ in range(count)]
    x = torch.randn(rows, module.in_features, device=device, dtype=dtype)
    if device.type == "cuda":
        return seconds_of(lambda made: made(x), ours) / seconds_of(lambda made: made(x), dense)
    return ratio_by_turns(lambda made: made(x), ours, dense)


def _like(kind: Callable[..., CompressedLinear], module: CompressedLinear, rows: int) -> nn.Module:
    """A module of the same shape with weights of its own, and the kernels that it would have."""
    dtype, device = module.weight.dtype, module.weight.device
    shape = (module.in_features, module.out_features, _nearby_rank(module))
    new = kind(*shape, bias=False, device="meta", dtype=dtype)
    _filled(new, device)
    if kind is type(module):
        new.put_own(module.own(), None)
    new.set_inference(True)
    for name, linear in list(new.named_children()):
        faster = faster_linear(
            linear, encoding_named(module.encoding), [rows], new.output_places(name), compiled=False
        )
        if faster is not None:
            new.set_submodule(name, faster)
    return new.eval()


def _filled(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with memory of its own, and in it some numbers: not those of drawing, which takes longer."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.data.fill_(1 / 64)
    return module
