"""The bound of a generation: bytes moved over the machine's bandwidth, operations over its peak, both measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..model.footprint import macs_per_token, resident_bytes
from .generation import Cell

_READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_SECONDS = 0.5


@dataclass(frozen=True)
class MachineSpeed:
    """What the machine reaches at its best: bytes a second from memory, and operations a second in products."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Traffic:
    """What one token of a model takes.

    Attributes:
        weight_bytes: of what is read for a token.
        macs: multiply-adds of its linears for one token.
        head_macs: of them those of the output head, which sees the last token of a prompt alone.
        cache_bytes: that one token adds to the cache of keys and values.
        attention_macs: multiply-adds for one token with one token before it.
        window: how many tokens attention looks back at most; None is all.
    """

    weight_bytes: int
    macs: int
    head_macs: int
    cache_bytes: int
    attention_macs: int
    window: int | None = None


@dataclass(frozen=True)
class Bound:
    """Seconds that the first token, and every further one, take at least."""

    first: float
    gap: float


def measure_machine(device: torch.device, dtype: torch.dtype) -> MachineSpeed:
    """Measure for some seconds; the fastest repetition counts: a bound is what is possible."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    return MachineSpeed(
        bandwidth=_bandwidth(device, _READ_BYTES[kind]),
        flops=max(_product_rate(device, dtype, size) for size in _SQUARES[kind]),
    )


def _bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second: of a sum, of a product with a vector, or of a copy, which reads and writes."""
    source = torch.ones(size // 4, device=device)
    target, matrix, vector = torch.empty_like(source), source.view(-1, 4096), torch.ones(4096, device=device)
    read = min(_fastest(source.sum, device), _fastest(partial(torch.mv, matrix, vector), device))
    return max(source.nbytes / read, 2 * source.nbytes / _fastest(partial(target.copy_, source), device))


def _product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of square matrices."""
    square = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _fastest(partial(torch.mm, square, square), device)


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest repetition within a while."""
    best, begun = math.inf, time.perf_counter()
    work()
    while best == math.inf or time.perf_counter() - begun < _SECONDS:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def traffic_of(model: Any, device: torch.device) -> Traffic:
    """Count what one token takes, by a pass of one token: experts that it is not routed to are not counted."""
    seen: dict[nn.Module, tuple[int, int]] = {}

    def count(module: nn.Module, args: Any, output: Any) -> None:
        own = sum(
            tensor.nbytes for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None
        )
        if isinstance(module, nn.Embedding):
            own //= module.num_embeddings
        elif not list(module.children()):
            own = resident_bytes(module)
        seen[module] = own, macs_per_token(module) if not list(module.children()) else 0

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    head = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    layers, groups = getattr(config, "num_hidden_layers", 0), getattr(config, "num_key_value_heads", None) or heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return Traffic(
        weight_bytes=sum(own for own, _ in seen.values()),
        macs=sum(macs for _, macs in seen.values()),
        head_macs=seen.get(head, (0, 0))[1],
        cache_bytes=2 * layers * groups * width * model.dtype.itemsize,
        attention_macs=2 * layers * heads * width,
        window=window,
    )


def bound_of(traffic: Traffic, cell: Cell, new_tokens: int, machine: MachineSpeed) -> Bound:
    """Return the least seconds that a cell takes on a machine that does nothing but move these bytes and multiply."""
    before = cell.prompt + new_tokens / 2
    seen = before if traffic.window is None else min(before, traffic.window)
    moved = traffic.weight_bytes + cell.batch * seen * traffic.cache_bytes
    operations = 2 * cell.batch * (traffic.macs + seen * traffic.attention_macs)
    gap = max(moved / machine.bandwidth, operations / machine.flops)
    pairs = cell.prompt * min(cell.prompt / 2, traffic.window or math.inf)
    linears = cell.prompt * (traffic.macs - traffic.head_macs) + traffic.head_macs
    moved = traffic.weight_bytes + cell.batch * cell.prompt * traffic.cache_bytes
    operations = 2 * cell.batch * (linears + pairs * traffic.attention_macs)
    return Bound(max(moved / machine.bandwidth, operations / machine.flops), gap)


def bytes_needed(model: Any, cell: Cell, new_tokens: int) -> int:
    """Return about how many bytes a generation holds beside the weights: cache, activations of a block, logits.

    Works on meta tensors. Zero where the configuration names no sizes.
    """
    config: Any = model.config.get_text_config(decoder=True)
    width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    heads = getattr(config, "num_attention_heads", 1) or 1
    share = (getattr(config, "num_key_value_heads", None) or heads) / heads
    size = model.dtype.itemsize
    cache = 2 * layers * width * share * cell.batch * (cell.prompt + new_tokens) * size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    block = (6 * width + 3 * inner) * cell.batch * cell.prompt * size
    logits = 3 * cell.batch * getattr(config, "vocab_size", 0) * 4
    return int(cache + block + logits)
