"""Calibration windows through a model, block by block.

The inputs of the first block are recorded for every batch, together with the arguments each block is called with (masks,
position embeddings). From then on one block at a time sits on the compute device, takes all batches, and hands its
outputs to the next. Only the hidden states at one boundary are kept. Visitors look at the block while it runs. A
backward pass is a second walk over the same blocks from the stored boundaries.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .dataset import CalibrationWindows

logger = logging.getLogger(__name__)


class BlockVisitor(Protocol):
    """What wants to watch blocks run: hooks are its business, the walk is the runner's."""

    def wants(self, name: str) -> bool:
        """Whether this block is to be watched; the others run all the same, since the next needs their outputs."""

    def enter(self, name: str, block: nn.Module) -> None:
        """Called before the block takes its first batch, with the block on the compute device."""

    def start_batch(self, mask: Tensor) -> None:
        """Called before each batch with its token mask (`batch x seqlen`, bool, False for padding)."""

    def leave(self, name: str, block: nn.Module) -> None:
        """Called after the last batch."""

    def abandon(self) -> None:
        """Called instead of `leave` when something failed: take the hooks off."""


class _Recorded(Exception):
    """Raised inside the last block of a recording pass: nothing after it is needed."""


class BlockRunner:
    """Runs windows through the blocks of a model.

    Args:
        model: a transformers model; with Accelerate hooks its own placement is used, otherwise one block at a time is
            moved to `device`.
        blocks: its blocks in order, by full name.
        windows: `N x seqlen` tokens.
        batch_size: windows per forward pass.
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
        self._model = model
        self._blocks = blocks
        self._batches = list(windows.batches(batch_size))
        self._device = torch.device(device) if device is not None else None
        self._hidden: list[Tensor] = []
        self._arguments: list[dict[str, tuple[tuple, dict[str, Any]]]] = []

    @torch.no_grad()
    def run(self, visitor: BlockVisitor, description: str = "calibrating") -> None:
        """One walk over all blocks. Raises ValueError naming the block when its output is not finite."""
        was_training = self._model.training
        self._model.eval()
        try:
            with _without_cache(self._model):
                if self._blocks_stand_alone():
                    self._walk(visitor, description)
                else:
                    logger.warning(
                        "%s passes state between its blocks: calibrating with whole forward passes, all blocks at once",
                        type(self._model).__name__,
                    )
                    self._whole_model(visitor, description)
        except BaseException:
            visitor.abandon()
            raise
        finally:
            self._model.train(was_training)
            self._hidden, self._arguments = [], []

    def _walk(self, visitor: BlockVisitor, description: str) -> None:
        self._record(self._batches)
        for name, block in tqdm(self._blocks.items(), desc=description, unit="block"):
            watched = visitor.wants(name)
            with _on_device(block, self._device):
                if watched:
                    visitor.enter(name, block)
                for index, (_, mask) in enumerate(self._batches):
                    if watched:
                        visitor.start_batch(mask)
                    self._hidden[index] = self._through(name, block, index)
                    if not bool(torch.isfinite(self._hidden[index]).all()):
                        raise ValueError(
                            f"{name}: its output has NaN or infinite values on calibration batch {index}. Check the "
                            "checkpoint, or load the model in float32 or bfloat16 (float16 overflows)"
                        )
                if watched:
                    visitor.leave(name, block)

    def _through(self, name: str, block: nn.Module, index: int) -> Tensor:
        args, kwargs = self._arguments[index][name]
        device = self._device
        hidden = self._hidden[index]
        if device is not None and not _is_dispatched(block):
            hidden, args, kwargs = _to((hidden, args, kwargs), device)
        output = block(hidden, *args, **kwargs) if "hidden_states" not in kwargs else block(**{**kwargs, "hidden_states": hidden})
        return _hidden_of(output).to(self._hidden[index].device)

    def _record(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Fill `_hidden` and `_arguments` from a forward pass in which no block computes anything."""
        self._hidden, self._arguments = [], []
        last = list(self._blocks)[-1]
        current: dict[str, tuple[tuple, dict[str, Any]]] = {}

        def recorder(name: str):
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

        with _replaced_forward({block: recorder(name) for name, block in self._blocks.items()}):
            for ids, mask in batches:
                current.clear()
                with contextlib.suppress(_Recorded):
                    self._forward(ids, mask)
                self._arguments.append(self._shared_with_first(dict(current)))

    def _shared_with_first(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The first batch's arguments where they are equal: unpadded batches of one size need one mask, not hundreds."""
        if self._arguments and _equal(arguments, self._arguments[0]):
            return self._arguments[0]
        return arguments

    def _forward(self, ids: Tensor, mask: Tensor) -> Any:
        device = next((p.device for p in self._model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        # An all-ones mask says nothing, and without it attention can take its fast path.
        attention = {} if bool(mask.all()) else {"attention_mask": mask.long().to(device)}
        body = getattr(self._model, "base_model", self._model)
        return body(input_ids=ids.to(device), use_cache=False, **attention)

    def _blocks_stand_alone(self) -> bool:
        """Whether the blocks, fed one after the other, give what the model gives: tried on one window."""
        ids, mask = self._batches[0]
        first = (ids[:1], mask[:1])
        self._returns_tuple: set[str] = set()
        outputs: dict[str, Tensor] = {}
        calls = {name: 0 for name in self._blocks}

        def watch(name: str):
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                calls[name] += 1
                if isinstance(output, tuple):
                    self._returns_tuple.add(name)
                outputs.clear()
                outputs[name] = _hidden_of(output).detach()

            return hook

        handles = [block.register_forward_hook(watch(name)) for name, block in self._blocks.items()]
        try:
            self._forward(*first)
        finally:
            for handle in handles:
                handle.remove()
        if any(count != 1 for count in calls.values()):
            return False
        try:
            self._record([first])
            for name, block in self._blocks.items():
                with _on_device(block, self._device):
                    self._hidden[0] = self._through(name, block, 0)
        except (TypeError, KeyError, IndexError, RuntimeError, AttributeError) as error:
            logger.warning("the blocks cannot be run one by one (%s)", error)
            return False
        expected = outputs[list(self._blocks)[-1]].float().cpu()
        found = self._hidden[0].float().cpu()
        if not bool(torch.isfinite(expected).all()):
            return True  # the walk will name the block that breaks
        return found.shape == expected.shape and bool(torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())))

    def _whole_model(self, visitor: BlockVisitor, description: str) -> None:
        watched = {name: block for name, block in self._blocks.items() if visitor.wants(name)}
        for name, block in watched.items():
            visitor.enter(name, block)
        for ids, mask in tqdm(self._batches, desc=description, unit="batch"):
            visitor.start_batch(mask)
            self._forward(ids, mask)
        for name, block in watched.items():
            visitor.leave(name, block)


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _is_dispatched(module: nn.Module) -> bool:
    return any(hasattr(child, "_hf_hook") for child in module.modules())


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to(item, device) for item in value)
    return value


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return one is other or isinstance(one, bool | int | float | str) and one == other


@contextlib.contextmanager
def _on_device(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The block on the compute device, and afterwards back where it was. Accelerate's own placement is left alone."""
    home = next((parameter.device for parameter in block.parameters()), None)
    if device is None or home is None or home == device or _is_dispatched(block):
        yield
        return
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


@contextlib.contextmanager
def _replaced_forward(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """Give modules another `forward`, on the instance, as Accelerate's hooks do; put the old one back afterwards."""
    previous = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, old in previous.items():
            if old is None:
                del module.__dict__["forward"]
            else:
                module.forward = old


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "use_cache"):
        yield
        return
    before = config.use_cache
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before
