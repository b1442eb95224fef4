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
from .cpu_linear import BY_COLUMNS, faster_on_cpu, runs_as_loop
from .device_time import cold_copies, ratio_by_turns, seconds_of
from .measurements import Ratios, keep
from .thin_linear import faster_by_kernel

_CLEARLY = 1.05
"""How much faster two factors must be than pivoted rows, in fewer numbers: what two equal products may differ by."""
_SLOWER = 1.02
"""How much slower than dense matrices must be to be held dense beside: for less the memory is not worth it."""
_MANY_ROWS = 2048
"""Products of more rows are as much faster or slower than dense ones."""
_RANK_STEP = 16

SPEEDS = Ratios("structure")
"""Times of a matrix in a structure over dense times."""


def fastest_structures(
    together: Sequence[CompressedLinear], rows: Sequence[int], compiled: bool
) -> dict[int, list[str]]:
    """Return for each number of `rows` the structures in which matrices are fastest: their own, or others.

    `low_rank` is for a pivoted one where two factors give its outputs in order sooner than they can be put in order:
    for all numbers of rows or none, since both have the same values. Matrices that read one input are all dense or
    none: only those that are alike can be joined to one product.
    """
    kinds = [_fastest_factors(module, rows, compiled) for module in together]
    sizes = [module.out_features * module.in_features for module in together]
    found = {}
    for count in rows:
        times = [
            size * _time_of(kind, module, count, compiled)
            for size, kind, module in zip(sizes, kinds, together, strict=True)
        ]
        dense = sum(times) > _SLOWER * sum(sizes)
        found[count] = ["dense" if dense else kind.structure for kind in kinds]
    return found


def _fastest_factors(module: CompressedLinear, rows: Sequence[int], compiled: bool) -> type[CompressedLinear]:
    """Its own structure or another one with a rank: what is fastest over all rows, dense where it is slower."""

    def time_of(kind: type[CompressedLinear]) -> float:
        return statistics.fmean(math.log(min(1.0, _time_of(kind, module, count, compiled))) for count in rows)

    fastest: type[CompressedLinear] = type(module)
    # On GPUs the second linear's kernel stores its outputs to their places.
    if isinstance(module, PivotedLinear) and module.weight.device.type == "cpu":
        two_factors = time_of(LowRankLinear) + math.log(_CLEARLY) < time_of(type(module))
        fastest = LowRankLinear if two_factors else fastest
    return fastest


def _time_of(kind: type[CompressedLinear], module: CompressedLinear, rows: int, compiled: bool) -> float:
    """The time of a matrix in that structure over a dense one's.

    Loops of a compiler are not measured: they take as long as reading the weights, where dense products take longer.
    """
    if not compiled or not runs_as_loop(module.weight.dtype, module.weight.device, rows):
        return _ratio(kind, module, rows)
    shape = (module.out_features, module.in_features)
    return sum(math.prod(each) for each in kind.linears(*shape, module.rank).values()) / math.prod(shape)


def keep_measurements() -> None:
    """Keep what was measured for other processes."""
    keep(SPEEDS, BY_COLUMNS)


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
    return SPEEDS.of(speed_key(module, rows, kind), lambda: _measured(kind, module, min(rows, _MANY_ROWS)))


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
