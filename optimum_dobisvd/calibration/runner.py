"""Forward passes of calibration windows through a model, block by block.

The inputs of the first block are recorded for every batch, together with the arguments each block is called with
(masks, position embeddings). Then one block at a time is moved to the compute device and takes all batches; its
outputs are the inputs of the next. Only the hidden states at one boundary are kept. Visitors observe a block while it
runs. `backward.py` goes over the same blocks in reverse.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from .dataset import CalibrationWindows
from .temporarily import (
    computes_in_float32,
    evaluating,
    in_float32,
    is_dispatched,
    on_device,
    replaced_forward,
    without_cache,
)

logger = logging.getLogger(__name__)


class BlockVisitor(Protocol):
    """An observer of blocks while they run, by hooks of its own; the runner runs them."""

    def wants(self, name: str) -> bool:
        """Return whether to visit this block; the others run all the same, since the next needs their outputs."""

    def enter(self, name: str, block: nn.Module) -> None:
        """Begin with a block: before its first batch, with the block on the compute device."""

    def start_batch(self, mask: Tensor) -> None:
        """Begin with a batch, whose token mask this is (`batch x seqlen`, bool, False for padding)."""

    def leave(self, name: str, block: nn.Module) -> None:
        """End with a block: after its last batch, with the block back where it was."""

    def abandon(self) -> None:
        """Remove all hooks, instead of `leave`, after an error."""


_INPUT = "{}: its input, the embeddings,"


class _Recorded(Exception):
    """A signal from the last block of a recording pass that nothing after it is needed."""


class BlockRunner:
    """A runner of calibration windows through the blocks of a model.

    Args:
        model: a transformers model; with Accelerate hooks its own placement is used, otherwise one block at a time is
            moved to `device`.
        blocks: its blocks in order, by full name.
        windows: `N x seqlen` tokens.
        batch_size: windows per forward pass.
        device: compute device; None means where the weights are.

    Raises:
        ValueError: `batch_size` is not a positive integer.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[str, nn.Module],
        windows: CalibrationWindows,
        *,
        batch_size: int = 4,
        device: str | torch.device | None = None,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._batches = list(windows.batches(batch_size))
        self._device = torch.device(device) if device is not None else None
        self._hidden: list[Tensor] = []
        self._arguments: list[dict[str, tuple[tuple, dict[str, Any]]]] = []
        self._returns_tuple: set[str] = set()
        self._may_widen = True

    @torch.no_grad()
    def run(self, visitor: BlockVisitor, description: str = "calibrating") -> None:
        """Run all windows once through all blocks.

        Args:
            visitor: observes the blocks that it wants.
            description: words beside the progress bar.

        Raises:
            ValueError: the output of a block is not finite on some token; names the block.
        """
        try:
            with evaluating(self._model), without_cache(self._model):
                if self._blocks_stand_alone():
                    self._walk(visitor, description)
                else:
                    logger.warning(
                        "%s passes state between its blocks: calibrating with full forward passes, all blocks at once",
                        type(self._model).__name__,
                    )
                    self._full_forwards(visitor, description)
        except BaseException:
            visitor.abandon()
            raise
        finally:
            self._hidden, self._arguments = [], []

    @torch.no_grad()
    def run_sequentially(
        self, change: Callable[[str, nn.Module, Callable[[BlockVisitor], None]], None], description: str
    ) -> None:
        """Change the blocks one after the other, each on the outputs of the changed ones before it.

        Args:
            change: called with a block's name, the block on the compute device, and a function that runs all windows
                through the block as it is by then, observed by a visitor; `change` may call it several times.
            description: words beside the progress bar.

        Raises:
            ValueError: the output of a block is not finite on some token; names the block.
        """
        try:
            with evaluating(self._model), without_cache(self._model):
                alone = self._blocks_stand_alone()
                if alone:
                    self._record(self._batches)
                for name, block in tqdm(self._blocks.items(), desc=description, unit="block"):
                    with on_device(block, self._device):
                        change(name, block, partial(self._replay, name, block, alone))
                        if alone:
                            self._advance(name, block)
        finally:
            self._hidden, self._arguments = [], []

    def _replay(self, name: str, block: nn.Module, alone: bool, visitor: BlockVisitor) -> None:
        """Run all windows through one block, discarding its outputs; a block not `alone` needs the full model."""
        visitor.enter(name, block)
        try:
            for index, (ids, mask) in enumerate(self._batches):
                visitor.start_batch(mask)
                if alone:
                    self._through(name, block, index, self._hidden[index])
                else:
                    self._full_forward(ids, mask)
        except BaseException:
            visitor.abandon()
            raise
        visitor.leave(name, block)

    def _advance(self, name: str, block: nn.Module) -> None:
        """Replace the hidden states of all windows before a block by those after it."""
        for index, (_, mask) in enumerate(self._batches):
            self._hidden[index] = self._through(name, block, index, self._hidden[index])
            check_finite(f"{name}: its output", self._hidden[index], mask)

    def _walk(self, visitor: BlockVisitor, description: str) -> None:
        self._record(self._batches)
        for hidden, (_, mask) in zip(self._hidden, self._batches, strict=True):
            check_finite(_INPUT.format(next(iter(self._blocks))), hidden, mask)
        for name, block in tqdm(self._blocks.items(), desc=description, unit="block"):
            watched = visitor.wants(name)
            with on_device(block, self._device):
                if watched:
                    visitor.enter(name, block)
                for index, (_, mask) in enumerate(self._batches):
                    if watched:
                        visitor.start_batch(mask)
                    self._hidden[index] = self._through(name, block, index, self._hidden[index])
                    check_finite(f"{name}: its output", self._hidden[index], mask)
            if watched:
                visitor.leave(name, block)

    def _full_forwards(self, visitor: BlockVisitor, description: str) -> None:
        """Run full forward passes with all blocks visited at once."""
        watched = {name: block for name, block in self._blocks.items() if visitor.wants(name)}
        for name, block in watched.items():
            visitor.enter(name, block)
        for ids, mask in tqdm(self._batches, desc=description, unit="batch"):
            visitor.start_batch(mask)
            self._full_forward(ids, mask)
        for name, block in watched.items():
            visitor.leave(name, block)

    def _through(self, name: str, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run one batch's hidden states (`batch x seqlen x width`) through one block; dtype and device stay the same.

        TypeError if the block returns no hidden states.
        """
        args, kwargs = self._arguments[index][name]
        home, dtype = hidden.device, hidden.dtype
        if self._device is not None and not is_dispatched(block):
            hidden, args, kwargs = _mapped((hidden, args, kwargs), lambda tensor: tensor.to(self._device))
        with contextlib.ExitStack() as stack:
            if self._in_float32(block, hidden):
                stack.enter_context(in_float32(block))
                hidden, args, kwargs = _mapped((hidden, args, kwargs), _widened)
            if "hidden_states" in kwargs:
                output = block(*args, **{**kwargs, "hidden_states": hidden})
            else:
                output = block(hidden, *args, **kwargs)
        found = hidden_of(output)
        if found is None:
            raise TypeError(f"{name} returned {type(output).__name__}, not hidden states")
        return found.to(home, dtype)

    def _in_float32(self, module: nn.Module, hidden: Tensor) -> bool:
        return self._may_widen and not is_dispatched(module) and computes_in_float32(hidden.device, hidden.dtype)

    def _record(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Fill `_hidden` and `_arguments` from a forward pass in which no block computes anything."""
        self._hidden, self._arguments = [], []
        last = list(self._blocks)[-1]
        current: dict[str, tuple[tuple, dict[str, Any]]] = {}

        def recorder(name: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                if not current:
                    self._hidden.append(hidden)
                rest = dict(kwargs)
                if not args:
                    rest["hidden_states"] = None  # its place is known by name, its value changes from block to block
                current[name] = (args[1:], rest)
                if name == last:
                    raise _Recorded
                return (hidden,) if name in self._returns_tuple else hidden

            return forward

        with replaced_forward({block: recorder(name) for name, block in self._blocks.items()}):
            for ids, mask in batches:
                current.clear()
                with contextlib.suppress(_Recorded):
                    self._forward(ids, mask)
                self._arguments.append(self._shared_with_first(dict(current)))

    def _shared_with_first(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the first batch's arguments where they are equal, so that equal masks are held in memory once."""
        if self._arguments and _equal(arguments, self._arguments[0]):
            return self._arguments[0]
        return arguments

    def _forward(self, ids: Tensor, mask: Tensor, model: nn.Module | None = None) -> Any:
        """Run a forward pass of `model`, by default the model without its head; `ids`, `mask`: `batch x seqlen`."""
        device = next((p.device for p in self._model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        # An all-ones mask says nothing, and without it attention can take its fast path.
        attention = {} if bool(mask.all()) else {"attention_mask": mask.long().to(device)}
        body = model if model is not None else getattr(self._model, "base_model", self._model)
        return body(input_ids=ids.to(device), use_cache=False, **attention)

    def _blocks_stand_alone(self) -> bool:
        """Return whether the blocks, run one after the other, give what the model gives: tried on one window, or two.

        Two, because state that a block leaves behind for a later one looks right until the next window overwrites it.
        """
        windows = [(ids[:1], mask[:1]) for ids, mask in self._batches]
        other = next((window for window in windows[1:] if not torch.equal(window[0], windows[0][0])), None)
        windows = [windows[0]] if other is None else [windows[0], other]
        passes = [self._full_forward(*window) for window in windows]
        if any(called != list(self._blocks) or last is None for called, last in passes):
            return False
        try:
            self._may_widen = False  # the passes it is compared with are in the model's own dtype
            self._record(windows)
            for name, block in self._blocks.items():
                with on_device(block, self._device):
                    self._hidden = [
                        self._through(name, block, index, hidden) for index, hidden in enumerate(self._hidden)
                    ]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a block of an unknown architecture says when it is called out of turn
            logger.warning("the blocks cannot be run one by one (%s: %s)", type(error).__name__, error)
            return False
        finally:
            self._may_widen = True
        return all(_close(found, last) for found, (_, last) in zip(self._hidden, passes, strict=True))

    def _full_forward(self, ids: Tensor, mask: Tensor) -> tuple[list[str], Tensor | None]:
        """Run a full forward pass; returns the blocks' names in the order of their calls, and the last output."""
        called: list[str] = []
        last: Tensor | None = None

        def before(name: str, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not called:
                hidden = args[0] if args else kwargs.get("hidden_states")
                check_finite(_INPUT.format(name), hidden, mask)

        def after(name: str, _module: nn.Module, _args: tuple, output: Any) -> None:
            nonlocal last
            called.append(name)
            last = hidden_of(output)
            check_finite(f"{name}: its output", last, mask)
            if isinstance(output, tuple):
                self._returns_tuple.add(name)

        handles: list[RemovableHandle] = []
        try:
            for name, block in self._blocks.items():
                handles.append(block.register_forward_pre_hook(partial(before, name), with_kwargs=True))
                handles.append(block.register_forward_hook(partial(after, name)))
            self._forward(ids, mask)
        finally:
            for handle in handles:
                handle.remove()
        return called, last


def check_finite(what: str, hidden: Tensor | None, mask: Tensor) -> None:
    """Raise ValueError if the hidden states of any token are not finite; those of padding may be anything."""
    if hidden is None or bool(torch.isfinite(hidden).all()):
        return
    if hidden.shape[:2] == mask.shape and bool(torch.isfinite(hidden[mask.to(hidden.device)]).all()):
        return
    raise ValueError(
        f"{what} has NaN or infinite values on the calibration tokens. Check the checkpoint, or load the model in "
        "float32 or bfloat16 (float16 overflows)"
    )


def hidden_of(output: Any) -> Tensor | None:
    """Return the hidden states in what a block returns, None where there are none."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    return hidden if isinstance(hidden, Tensor) else None


def _close(found: Tensor, expected: Tensor | None) -> bool:
    """Return whether two tensors are equal up to the rounding of different devices and kernels."""
    if expected is None or found.shape != expected.shape:
        return False
    found, expected = (each.detach().cpu().nan_to_num() for each in (found, expected))  # padding may be NaN
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((found.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, function) for item in value)
    return value


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return one is other or (isinstance(one, bool | int | float | str) and one == other)
