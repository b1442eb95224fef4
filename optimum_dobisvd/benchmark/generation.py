"""One generation, token by token: transformers' own `generate`, greedy, of a fixed number of tokens."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """What is generated: `batch` sequences, each after `prompt` tokens."""

    batch: int
    prompt: int

    def __str__(self) -> str:
        return f"batch {self.batch}, prompt {self.prompt}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one generation: until the first token of every sequence is there, and from each token to the next."""

    first: float
    gaps: tuple[float, ...]

    @property
    def total(self) -> float:
        """Seconds until the last token."""
        return self.first + sum(self.gaps)


class _Clock:
    """A stopping criterion that stops nothing and writes down when every token was there.

    On a GPU by events, which do not wait: waiting for every token would forbid the host to run ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = [self._now()]

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.marks.append(self._now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def timing(self, new_tokens: int) -> Timing:
        """Return the seconds; the host may have run ahead by a token, which does not count."""
        if self.on_gpu:
            torch.cuda.synchronize()
        marks = self.marks[: new_tokens + 1]
        gaps = [self._seconds(one, other) for one, other in itertools.pairwise(marks)]
        return Timing(gaps[0], tuple(gaps[1:]))

    def _seconds(self, one: Any, other: Any) -> float:
        return one.elapsed_time(other) / 1000 if self.on_gpu else other - one


@torch.inference_mode()
def generate(model: Any, cell: Cell, new_tokens: int, device: torch.device, *, static: bool = False) -> Timing:
    """Generate after a random prompt.

    Args:
        model: a causal model.
        cell: how many sequences, after how many tokens.
        new_tokens: of each sequence, at least 2; none ends before.
        device: that it computes on; weights may be offloaded from it.
        static: with a cache of fixed size, for compiled models.
    """
    from transformers import StoppingCriteriaList

    vocabulary, generator = model.get_input_embeddings().num_embeddings, torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (cell.batch, cell.prompt), generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = _Clock(device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="static" if static else None,
        disable_compile=True,  # what is to be compiled is (see `compiled`), on any device
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock.timing(new_tokens)


def compiled_forward(model: Any, *, fullgraph: bool) -> Callable[..., Any]:
    """Return a forward whose steps of one token are compiled, CUDA graphs on GPUs; prompts are not.

    What transformers does by itself in `generate(cache_implementation="static")` on a GPU, here on CPUs as well.

    Args:
        model: a causal model.
        fullgraph: fail where there is a graph break.
    """
    plain = model.forward
    compiled = torch.compile(plain, fullgraph=fullgraph, dynamic=False, mode="reduce-overhead")

    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        return (compiled if ids is not None and ids.shape[-1] == 1 else plain)(*args, **kwargs)

    return forward


@contextlib.contextmanager
def using_forward(model: Any, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Have a model compute by another forward for a while; None: by its own."""
    if forward is None:
        yield
        return
    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own
