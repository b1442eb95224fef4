"""Forward passes of calibration windows through a model, block by block.

The inputs of the first block are recorded for every batch, together with the arguments each block is called with
(masks, position embeddings). Then one block at a time is moved to the compute device and takes all batches; its
outputs are the inputs of the next. Only the hidden states at one boundary are kept. Visitors observe a block while it
runs. `backward.py` goes over the same blocks in reverse.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .dataset import CalibrationWindows
from .loss import forward_pass
from .nested import equal, mapped
from .temporarily import (
    computes_in_float32,
    evaluating,
    in_float32,
    is_dispatched,
    on_device,
    replaced_forward,
    without_cache,
)
from .tokens import token_places
from .visitor import BlockVisitor

logger = logging.getLogger(__name__)


_TRIED_TOKENS = 256
_INPUT = "{}: its input, the embeddings,"


class _Recorded(Exception):
    """A signal from the last block of a recording pass that nothing after it is needed."""


class BlockRunner:
    """A runner of calibration windows through the blocks of a model.

    Args:
        model: a transformers model; with Accelerate hooks its own placement is used, otherwise one block at a time is
            moved to `device`.
        blocks: its blocks in order, by full name.
        windows: `N x seqlen` tokens, of which `batch_size` at a time are run, and one where there is padding (see
            `tokens`); ValueError unless that is positive.
        device: compute device; None means where the weights are.
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
        self.model, self._blocks = model, blocks
        self._batches: list[tuple[Tensor, Tensor]] = []
        for ids, mask in windows.batches(batch_size):
            self._batches += [(ids, mask)] if bool(mask.all()) else one_by_one([(ids, mask)])
        self._device = torch.device(device) if device is not None else None
        self._hidden: list[Tensor] = []
        self._arguments: list[dict[str, tuple[tuple, dict[str, Any]]]] = []
        self._returns_tuple: set[str] = set()
        self._may_widen = True

    @torch.no_grad()
    def run(self, visitor: BlockVisitor, description: str = "calibrating") -> None:
        """Run all windows once through all blocks, with `description` beside the progress bar.

        ValueError names the block whose output is not finite on some token.
        """
        if visitor.needs_token_order:
            self._batches = one_by_one(self._batches)
        with self._running(visitor):
            if not self._blocks_stand_alone():
                logger.warning(
                    "%s passes state between its blocks: calibrating with full forward passes, all blocks at once",
                    type(self.model).__name__,
                )
                with self._visiting_all(visitor):
                    for ids, mask in tqdm(self._batches, desc=description, unit="batch"):
                        visitor.start_batch(mask)
                        self._full_forward(ids, mask)
                return
            self._record(self._batches)
            for hidden, (_, mask) in zip(self._hidden, self._batches, strict=True):
                check_finite(_INPUT.format(next(iter(self._blocks))), hidden, mask)
            for name, block in tqdm(self._blocks.items(), desc=description, unit="block"):
                watcher = visitor if visitor.wants(name) else None
                with on_device(block, self._device):
                    if watcher is not None:
                        watcher.enter(name, block)
                    self._advance(name, block, watcher)
                if watcher is not None:
                    watcher.leave(name, block)

    @torch.no_grad()
    def run_sequentially(
        self, change: Callable[[str, nn.Module, Callable[[BlockVisitor], None]], None], description: str
    ) -> None:
        """Change the blocks one after the other, each on the outputs of the changed ones before it.

        `change` is called with a block's name, the block on the compute device, and a function that runs all windows
        through the block as it is by then, observed by a visitor; it may call that several times. ValueError names the
        block whose output is not finite on some token. Windows are run one at a time.
        """
        self._batches = one_by_one(self._batches)
        with self._running():
            alone = self._blocks_stand_alone()
            if alone:
                self._record(self._batches)
            for name, block in tqdm(self._blocks.items(), desc=description, unit="block"):
                with on_device(block, self._device):
                    change(name, block, partial(self._replay, name, block, alone))
                    if alone:
                        self._advance(name, block)

    @contextlib.contextmanager
    def _running(self, visitor: BlockVisitor | None = None) -> Iterator[None]:
        """A context for passes through the model; it is restored at the end, and what was recorded is dropped."""
        try:
            with evaluating(self.model), without_cache(self.model):
                yield
        except BaseException:
            if visitor is not None:
                visitor.abandon()
            raise
        finally:
            self._hidden, self._arguments = [], []

    @contextlib.contextmanager
    def _visiting_all(self, visitor: BlockVisitor) -> Iterator[None]:
        """A context in which all wanted blocks are visited at once."""
        watched = {name: block for name, block in self._blocks.items() if visitor.wants(name)}
        for name, block in watched.items():
            visitor.enter(name, block)
        yield
        for name, block in watched.items():
            visitor.leave(name, block)

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

    def _advance(self, name: str, block: nn.Module, visitor: BlockVisitor | None = None) -> None:
        """Replace the hidden states of all windows before a block by those after it."""
        for index, (_, mask) in enumerate(self._batches):
            if visitor is not None:
                visitor.start_batch(mask)
            self._hidden[index] = self._through(name, block, index, self._hidden[index])
            check_finite(f"{name}: its output", self._hidden[index], mask)

    def _through(self, name: str, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run one batch's hidden states through one block; their dtype and device stay the same, and so do they.

        TypeError if the block returns no hidden states.
        """
        args, kwargs = self._arguments[index][name]
        home, dtype = hidden.device, hidden.dtype
        place = None if is_dispatched(block) else self._device
        widens = self._in_float32(block, place or home, dtype)

        def copied(tensor: Tensor) -> Tensor:
            """A block may change in place what it is given, and runs on it again."""
            wide = widens and tensor.dtype is torch.bfloat16
            return tensor.to(place or tensor.device, torch.float32 if wide else tensor.dtype, copy=True)

        hidden, args, kwargs = mapped((hidden, args, kwargs), copied)
        with in_float32(block) if widens else contextlib.nullcontext():
            if "hidden_states" in kwargs:
                output = block(*args, **{**kwargs, "hidden_states": hidden})
            else:
                output = block(hidden, *args, **kwargs)
        found = hidden_of(output)
        if found is None:
            raise TypeError(f"{name} returned {type(output).__name__}, not hidden states")
        return found.to(home, dtype)

    def _in_float32(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
        return self._may_widen and not is_dispatched(module) and computes_in_float32(device, dtype)

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
                # Where it has its place by name, its value changes from block to block.
                current[name] = (args[1:], kwargs if args else {**kwargs, "hidden_states": None})
                if name == last:
                    raise _Recorded
                return (hidden,) if name in self._returns_tuple else hidden

            return forward

        with replaced_forward({block: recorder(name) for name, block in self._blocks.items()}):
            for ids, mask in batches:
                current.clear()
                with contextlib.suppress(_Recorded):
                    forward_pass(self.model, ids, mask, head=False)
                # Equal arguments, such as masks, are held in memory once.
                shared = bool(self._arguments) and equal(current, self._arguments[0])
                self._arguments.append(self._arguments[0] if shared else dict(current))

    def _blocks_stand_alone(self) -> bool:
        """Return whether the blocks, run one after the other, give what the model gives: tried on one window, or two.

        Two, because state that a block leaves behind for a later one looks right until the next window overwrites it.
        Each block is run twice, because it may leave state behind for itself, and is replayed.
        """
        windows = [_shortened(ids[:1], mask[:1]) for ids, mask in self._batches]
        other = next((window for window in windows[1:] if not torch.equal(window[0], windows[0][0])), None)
        windows = windows[:1] if other is None else [windows[0], other]
        passes = [self._full_forward(*window) for window in windows]
        if any(called != list(self._blocks) or last is None for called, last in passes):
            return False
        try:
            self._may_widen = False  # the passes it is compared with are in the model's own dtype
            self._record(windows)
            for name, block in self._blocks.items():
                with on_device(block, self._device):
                    for index, hidden in enumerate(self._hidden):
                        again, self._hidden[index] = (self._through(name, block, index, hidden) for _ in range(2))
                        if not _close(again, self._hidden[index]):
                            return False
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
            if last is not None and len(called) == len(self._blocks):
                last = last.clone()  # what comes after the blocks may change it in place
            if isinstance(output, tuple):
                self._returns_tuple.add(name)

        with contextlib.ExitStack() as hooks:
            for name, block in self._blocks.items():
                hooks.callback(block.register_forward_pre_hook(partial(before, name), with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(partial(after, name)).remove)
            forward_pass(self.model, ids, mask, head=False)
        return called, last


def _shortened(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the beginning of a window of text, on which a model can be tried in little time."""
    begins = slice(None, _TRIED_TOKENS)
    # A row of a processor's batch is more than its ids.
    return (ids[:, begins], mask[:, begins]) if type(ids) is Tensor and bool(mask[:, begins].all()) else (ids, mask)


def check_finite(what: str, hidden: Tensor | None, mask: Tensor) -> None:
    """Raise ValueError if the hidden states of any token are not finite; those of padding may be anything."""
    if hidden is None or bool(torch.isfinite(hidden).all()):
        return
    places = token_places(hidden.shape[:-1], mask)
    if places is not None:
        finite = torch.isfinite(hidden).reshape(-1, hidden.shape[-1]).all(1).cpu()
        if bool(finite[places[mask.reshape(-1).cpu()]].all()):
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


def one_by_one(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return batches of one window each."""
    return [window for ids, mask in batches for window in zip(ids.split(1), mask.split(1), strict=True)]
