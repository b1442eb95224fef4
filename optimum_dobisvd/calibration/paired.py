"""Passes of calibration windows through a model's blocks as they were and as they become, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..model.experts import ROUTED_ROWS
from .runner import BlockRunner, one_by_one
from .temporarily import frozen, in_float32, on_device
from .tokens import token_rows
from .visitor import BlockVisitor

InputPairs = Callable[[Iterable[str]], Iterator[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]]
"""Names of modules of a block -> for every window its token mask, and what each module reads: in the dense model, and
in the changed one (`rows x n`, padding left out)."""


@dataclass(frozen=True)
class BlockPasses:
    """What a block of the dense model gives on the dense prefix, and passes of it on what the changed prefix gives.

    Attributes:
        targets: outputs of the dense block by batch, padding left out, `rows x width`.
        outputs: a batch's number -> what the block as it is now gives, in the same order, with gradients.
        inputs: a batch's number and names of modules -> what these read in the block as it is now, padding left out;
            a module that no token is routed to is missing.
    """

    targets: list[Tensor]
    outputs: Callable[[int], Tensor]
    inputs: Callable[[int, Iterable[str]], dict[str, Tensor]]


class PairedRunner(BlockRunner):
    """A runner that takes windows through the dense blocks and, beside them, through the changed ones."""

    def run_paired(
        self,
        dense: Callable[[str], AbstractContextManager[Any]],
        change: Callable[[str, nn.Module, BlockPasses], None],
        description: str,
    ) -> None:
        """Change the blocks one after the other, each on the outputs of the changed ones before it.

        Args:
            dense: block -> a context in which it computes as it does in the dense model.
            change: called with a block's name, the block on the compute device, and its passes.
            description: shown beside the progress bar.

        Raises:
            ValueError: the model passes state between its blocks, so they cannot be run one by one; or the output of a
                block is not finite (names it).
        """
        with self._running(), frozen(self.model), torch.no_grad():
            self._require_separate_blocks()
            self._record(self._batches)
            before = list(self._hidden)
            for name, block in tqdm(self._blocks.items(), desc=description, unit="block"):
                with on_device(block, self._device):
                    with dense(name):
                        before = [self._through(name, block, index, each) for index, each in enumerate(before)]
                    targets = [self._rows(name, index, each) for index, each in enumerate(before)]
                    with self._widened(block, targets[0]):  # backward passes read the weights, too
                        inputs = partial(self._inputs_now, name, block)
                        change(name, block, BlockPasses(targets, self._outputs_of(name, block), inputs))
                    self._advance(name, block)

    def run_beside(
        self,
        dense: Callable[[str, bool], AbstractContextManager[Any]],
        change: Callable[[str, nn.Module, Callable[[BlockVisitor], None], InputPairs], None],
        description: str,
    ) -> None:
        """Change the blocks one after the other as `run_sequentially` does, with the dense ones beside them.

        Args:
            dense: block, and whether it is the last time -> a context in which it computes as in the dense model.
            change: called with a block's name, the block on the compute device, what replays it, and its pairs of
                inputs. Windows are run one at a time.
            description: shown beside the progress bar.

        Raises:
            ValueError: as `run_paired`.
        """
        self._batches = one_by_one(self._batches)
        with self._running(), torch.no_grad():
            self._require_separate_blocks()
            self._record(self._batches)
            before = list(self._hidden)
            for name, block in tqdm(self._blocks.items(), desc=description, unit="block"):
                with on_device(block, self._device):
                    pairs = partial(self._pairs, name, block, partial(dense, name, False), before)
                    change(name, block, partial(self._replay, name, block, True), pairs)
                    with dense(name, True):
                        before = [self._through(name, block, index, each) for index, each in enumerate(before)]
                    self._advance(name, block)

    def _pairs(
        self,
        name: str,
        block: nn.Module,
        dense: Callable[[], AbstractContextManager[Any]],
        before: list[Tensor],
        modules: Iterable[str],
    ) -> Iterator[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
        for index, (_, mask) in enumerate(self._batches):
            with dense():
                there = self._inputs_of(name, block, index, before[index], modules)
            yield mask, there, self._inputs_of(name, block, index, self._hidden[index], modules)

    def _inputs_of(
        self, name: str, block: nn.Module, index: int, hidden: Tensor, modules: Iterable[str]
    ) -> dict[str, Tensor]:
        """Return what modules read, by name, in a pass of one batch through a block; rows as in `token_rows`."""
        found: dict[str, list[Tensor]] = {}

        def observe(module: str, _: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            rows = token_rows(module, x.detach(), self._batches[index][1], ROUTED_ROWS.get())
            found.setdefault(module, []).append(rows.float())

        with contextlib.ExitStack() as hooks:
            for each in modules:
                target = self.model.get_submodule(each)
                hooks.callback(target.register_forward_pre_hook(partial(observe, each), with_kwargs=True).remove)
            self._through(name, block, index, hidden)
        return {each: torch.cat(rows) for each, rows in found.items()}

    def _inputs_now(self, name: str, block: nn.Module, index: int, modules: Iterable[str]) -> dict[str, Tensor]:
        return self._inputs_of(name, block, index, self._hidden[index], modules)

    def require_separate_blocks(self) -> None:
        """Raise ValueError if the model passes state between its blocks, so that they cannot be run one by one."""
        with self._running(), torch.no_grad():
            self._require_separate_blocks()

    def _require_separate_blocks(self) -> None:
        if not self._blocks_stand_alone():
            raise ValueError(
                f"{type(self.model).__name__} passes state between its blocks, and rounding towards the dense model "
                "(learned, or feedback with target 'dense') runs one block at a time: take rounding='nearest', or for "
                "GPTQ and 4 bits of bitsandbytes 'feedback' with its usual target"
            )

    def _outputs_of(self, name: str, block: nn.Module) -> Callable[[int], Tensor]:
        def outputs(index: int) -> Tensor:
            with torch.enable_grad():
                return self._rows(name, index, self._through(name, block, index, self._hidden[index]))

        return outputs

    def _widened(self, block: nn.Module, hidden: Tensor) -> AbstractContextManager[None]:
        widens = self._in_float32(block, self._device or hidden.device, hidden.dtype)
        return in_float32(block, keep_changes=True) if widens else contextlib.nullcontext()

    def _rows(self, name: str, index: int, hidden: Tensor) -> Tensor:
        return token_rows(name, hidden, self._batches[index][1])
