"""Passes of calibration windows through a model's blocks as they were and as they become, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .runner import BlockRunner
from .temporarily import frozen, in_float32, on_device
from .tokens import token_rows


@dataclass(frozen=True)
class BlockPasses:
    """What a block of the dense model gives on the dense prefix, and passes of it on what the changed prefix gives.

    Attributes:
        targets: outputs of the dense block by batch, padding left out, `rows x width`.
        outputs: a batch's number -> what the block as it is now gives, in the same order, with gradients.
    """

    targets: list[Tensor]
    outputs: Callable[[int], Tensor]


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
                        change(name, block, BlockPasses(targets, self._outputs_of(name, block)))
                    self._advance(name, block)

    def require_separate_blocks(self) -> None:
        """Raise ValueError if the model passes state between its blocks, so that they cannot be run one by one."""
        with self._running(), torch.no_grad():
            self._require_separate_blocks()

    def _require_separate_blocks(self) -> None:
        if not self._blocks_stand_alone():
            raise ValueError(
                f"{type(self.model).__name__} passes state between its blocks, and learned rounding runs one block at "
                "a time: take rounding='nearest', or for GPTQ and 4 bits of bitsandbytes 'feedback'"
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
