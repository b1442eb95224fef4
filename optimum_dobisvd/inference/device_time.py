"""How long a GPU takes for products, without the time of launching them, which graphs and compilers take away."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_REPLAYS = 5
_COLD_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
"""A product in a model finds its weights in memory and not in a cache: copies are taken by turns that fill one."""
_MOST_COPIES = {"cpu": 8, "cuda": 32}


def cold_copies(size: int, device: torch.device) -> int:
    """Return how many copies of a weight of that many bytes are to be multiplied by turns."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    return max(1, min(_MOST_COPIES[kind], _COLD_BYTES[kind] // max(1, size)))


def seconds_of(call: Callable[[Any], Any], modules: Sequence[Any]) -> float:
    """Return the seconds of one call, all modules being called one after the other.

    On a GPU they are captured as a CUDA graph, which is replayed; the median counts. Elsewhere by the clock, once.
    """
    device = next(modules[0].parameters()).device
    call(modules[0])
    if device.type != "cuda":
        begun = time.perf_counter()
        for module in modules:
            call(module)
        return (time.perf_counter() - begun) / len(modules)
    with torch.cuda.device(device):
        graph = _captured(call, modules)
        times = [_replayed(graph) for _ in range(_REPLAYS + 1)]
    return statistics.median(times[1:]) / len(modules)


def _captured(call: Callable[[Any], Any], modules: Sequence[Any]) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make their handles and workspaces outside of the capture
        for module in modules:
            call(module)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for module in modules:
            call(module)
    return graph


def _replayed(graph: Any) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000
