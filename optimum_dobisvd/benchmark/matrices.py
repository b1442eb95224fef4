"""How long every matrix of a model takes while it generates."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .generation import Cell, generate

_NOISE = 1.1
"""A matrix takes longer than another where its time is above that many times the other's."""


@dataclass(frozen=True)
class MatrixTime:
    """Seconds of one matrix: for all tokens of a prompt, and for one further token of every sequence."""

    first: float
    gap: float


@dataclass(frozen=True)
class SlowMatrix:
    """A matrix that takes longer than the dense one it stands for.

    Attributes:
        name: of the module.
        first, gap: seconds above those of the dense one; 0 where it is not slower.
        first_times, gap_times: its seconds over those of the dense one.
    """

    name: str
    first: float
    gap: float
    first_times: float
    gap_times: float


def matrix_times(
    model: Any, names: Iterable[str], cell: Cell, new_tokens: int, device: torch.device
) -> dict[str, MatrixTime]:
    """Return what the modules of these names take in one generation, without compilation; medians over its tokens.

    Modules that are not there, or not called, are left out.
    """
    there = dict(model.named_modules())
    on_gpu = device.type == "cuda"
    marks: dict[str, list[Any]] = defaultdict(list)

    def mark(name: str) -> None:
        if on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks[name].append(event)
        else:
            marks[name].append(time.perf_counter())

    hooks = []
    for name in names:
        module = there.get(name)
        if isinstance(module, nn.Module):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: mark(name)))
            hooks.append(module.register_forward_hook(lambda *_, name=name: mark(name)))
    try:
        generate(model, cell, new_tokens, device)
    finally:
        for hook in hooks:
            hook.remove()
    if on_gpu:
        torch.cuda.synchronize()
    found = {}
    for name, times in marks.items():
        begun, ended = times[::2], times[1::2]
        taken = [
            one.elapsed_time(other) / 1000 if on_gpu else other - one for one, other in zip(begun, ended, strict=True)
        ]
        if len(taken) > 1:
            found[name] = MatrixTime(taken[0], statistics.median(taken[1:]))
    return found


def medians(rounds: Iterable[Mapping[str, MatrixTime]]) -> dict[str, MatrixTime]:
    """Return the medians of several rounds."""
    every: dict[str, list[MatrixTime]] = defaultdict(list)
    for times in rounds:
        for name, found in times.items():
            every[name].append(found)
    return {
        name: MatrixTime(
            statistics.median(each.first for each in found), statistics.median(each.gap for each in found)
        )
        for name, found in every.items()
    }


def slow_matrices(dense: Mapping[str, MatrixTime], compressed: Mapping[str, MatrixTime]) -> list[SlowMatrix]:
    """Return the matrices that take longer than dense in either phase, in the order of the model."""
    found = []
    for name, times in compressed.items():
        if name not in dense:
            continue
        ratios = times.first / dense[name].first, times.gap / dense[name].gap
        above = times.first - dense[name].first, times.gap - dense[name].gap
        first, gap = (more if ratio > _NOISE else 0.0 for more, ratio in zip(above, ratios, strict=True))
        if first or gap:
            found.append(SlowMatrix(name, first, gap, *ratios))
    return found
