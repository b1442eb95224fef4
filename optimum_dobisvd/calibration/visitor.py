"""Observers of blocks while a runner takes calibration text through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class BlockVisitor(Protocol):
    """An observer of blocks while they run, by hooks of its own; the runner runs them.

    `needs_token_order`: it must know which row of an activation is which token, so windows are run one at a time.
    """

    needs_token_order: bool

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


class LinearsVisitor(ABC):
    """A block visitor that sums something at every linear of a block: subclasses give the hooks and the result.

    Args:
        linears_of: block name -> its linears by full name.
        finished: called with block name and result after each block.
        wanted: block name -> whether to visit it.
    """

    needs_token_order = False

    def __init__(
        self,
        linears_of: Callable[[str], dict[str, nn.Module]],
        finished: Callable[[str, Any], None],
        wanted: Callable[[str], bool],
    ) -> None:
        self._linears_of, self._finished, self._wanted = linears_of, finished, wanted
        self._mask: Tensor | None = None
        self._sums: dict[str, Any] = {}  # by linear
        self._tokens: dict[str, int] = {}  # of text, by open block
        self._hooks = ExitStack()

    def wants(self, name: str) -> bool:
        return self._wanted(name)

    def enter(self, name: str, block: nn.Module) -> None:
        self._tokens[name] = 0
        for linear, module in self._linears_of(name).items():
            self._hooks.callback(self._hook(name, linear, module).remove)

    def start_batch(self, mask: Tensor) -> None:
        self._mask = mask
        for name in self._tokens:
            self._tokens[name] += int(mask.sum())

    def leave(self, name: str, block: nn.Module) -> None:
        self._hooks.close()  # blocks that are open together have all had their last batch
        self._finished(name, self._result(name))
        del self._tokens[name]

    def abandon(self) -> None:
        self._hooks.close()
        self._sums.clear()
        self._tokens.clear()

    @abstractmethod
    def _hook(self, block: str, linear: str, module: nn.Module) -> RemovableHandle:
        """Hook one linear of a block, to sum what it sees."""

    @abstractmethod
    def _result(self, block: str) -> Any:
        """Return what the block's linears have summed."""
