"""Which matrices are slower than dense ones of their shape on this machine: measured once for every shape."""

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
from .cpu_linear import faster_on_cpu, runs_as_loop
from .device_time import cold_copies, ratio_by_turns, seconds_of
from .thin_linear import faster_by_kernel

_CLEARLY = 1.05
"""How much slower than dense a matrix must be to run dense: what two equal products may differ by."""

SPEEDS: dict[tuple[Any, ...], float] = {}
"""Times of a structure over dense times, by all that decides them. To override a measurement, set it here."""


def slower_than_dense(module: CompressedLinear, rows: Sequence[int], compiled: bool) -> bool:
    """Whether products of that many rows, over all of `rows`, take longer than dense ones.

    Loops of a compiler are not measured: they take as long as reading the weights, where dense products take longer.
    """
    dtype, device = module.weight.dtype, module.weight.device
    numbers = sum(weight.numel() for name, weight in module.named_parameters() if name.endswith("weight"))
    fewer = numbers / (module.out_features * module.in_features)
    ratios = [fewer if compiled and runs_as_loop(dtype, device, count) else _ratio(module, count) for count in rows]
    return math.exp(statistics.fmean(map(math.log, ratios))) > _CLEARLY


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


def speed_key(module: CompressedLinear, rows: int) -> tuple[Any, ...]:
    """Return by what `SPEEDS` has the speed of such a matrix."""
    shape = (module.structure, module.encoding, module.out_features, module.in_features, module.rank)
    return (*shape, rows, module.weight.dtype, module.weight.device, torch.get_num_threads())


def _ratio(module: CompressedLinear, rows: int) -> float:
    key = speed_key(module, rows)
    if key not in SPEEDS:
        SPEEDS[key] = _measured(module, rows)
    return SPEEDS[key]


@torch.no_grad()
def _measured(module: CompressedLinear, rows: int) -> float:
    """The time of a matrix like this one over that of a dense one."""
    device, dtype = module.weight.device, module.weight.dtype
    inputs, outputs = module.in_features, module.out_features
    count = cold_copies(inputs * outputs * dtype.itemsize, device)
    dense = [_filled(nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype), device) for _ in range(count)]
    ours = [_like(module, rows) for _ in range(count)]
    x = torch.randn(rows, module.in_features, device=device, dtype=dtype)
    if device.type == "cuda":
        return seconds_of(lambda made: made(x), ours) / seconds_of(lambda made: made(x), dense)
    return ratio_by_turns(lambda made: made(x), ours, dense)


def _like(module: CompressedLinear, rows: int) -> nn.Module:
    """A module of the same shape with weights of its own, and the kernels that it would have."""
    kind: Callable[..., CompressedLinear] = type(module)
    new = kind(
        module.in_features,
        module.out_features,
        module.rank,
        bias=False,
        device="meta",
        dtype=module.weight.dtype,
    )
    _filled(new, module.weight.device)
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
