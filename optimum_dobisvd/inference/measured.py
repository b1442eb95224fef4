"""Which matrices are slower than dense ones of their shape on this machine: measured once for every shape."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..encodings.registry import encoding_named
from ..structures.base import CompressedLinear
from .device_time import cold_copies, seconds_of
from .thin_linear import faster_by_kernel

_LEAST, _MOST = 5, 25
"""Rounds of a measurement: that many, or as many as fit into the seconds below."""
_SECONDS = 0.1
_CLEARLY = 1.05
"""How much slower than dense a matrix must be to run dense: what two equal products may differ by."""

SPEEDS: dict[tuple[Any, ...], float] = {}
"""Times of a structure over dense times, by all that decides them. To override a measurement, set it here."""


def slower_than_dense(module: CompressedLinear, rows: Sequence[int]) -> bool:
    """Whether products of that many rows, over all of `rows`, take longer than dense ones."""
    ratios = [_ratio(module, count) for count in rows]
    return math.exp(statistics.fmean(map(math.log, ratios))) > _CLEARLY


def speed_key(module: CompressedLinear, rows: int) -> tuple[Any, ...]:
    """Return by what `SPEEDS` has the speed of such a matrix."""
    shape = (module.structure, module.encoding, module.out_features, module.in_features, module.rank)
    return (*shape, rows, module.weight.dtype, module.weight.device, torch.get_num_threads())


def _ratio(module: CompressedLinear, rows: int) -> float:
    key = speed_key(module, rows)
    if key not in SPEEDS:
        SPEEDS[key] = _measured(module, rows)
    return SPEEDS[key]


@torch.inference_mode()
def _measured(module: CompressedLinear, rows: int) -> float:
    """Milliseconds by turns, and the ratio of their medians."""
    device, dtype = module.weight.device, module.weight.dtype
    inputs, outputs = module.in_features, module.out_features
    count = cold_copies(inputs * outputs * dtype.itemsize, device)
    dense = [_filled(nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype), device) for _ in range(count)]
    ours = [_like(module, rows) for _ in range(count)]
    x = torch.randn(rows, module.in_features, device=device, dtype=dtype)
    if device.type == "cuda":
        return seconds_of(lambda made: made(x), ours) / seconds_of(lambda made: made(x), dense)
    times: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    for turn in range(_MOST):
        for made, taken in zip((ours, dense), times, strict=True):
            taken.append(_seconds(made[turn % count], x))
        if turn >= _LEAST and time.perf_counter() - begun > _SECONDS:
            break
    # The first is of warming up.
    return statistics.median(times[0][1:]) / statistics.median(times[1][1:])


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
        faster = faster_by_kernel(linear, encoding_named(module.encoding), [rows], new.output_places(name))
        if faster is not None:
            new.set_submodule(name, faster)
    return new.eval()


def _filled(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with memory of its own, and in it some numbers: not those of drawing, which takes longer."""
    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.data.fill_(1 / 64)
    return module


def _seconds(module: nn.Module, x: torch.Tensor) -> float:
    begun = time.perf_counter()
    module(x)
    return time.perf_counter() - begun
