"""Backward passes of the loss through a model, block by block: gradients at every linear's output.

A forward pass keeps the hidden states at every boundary between blocks (on the CPU). The loss gives their gradient
after the last block. Then each block, from the last to the first, runs all batches again with gradients; the gradient
at its input is what the block before it starts from. That is gradient checkpointing with the block as its unit: memory
holds the boundaries and the activations of one block for one batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .loss import NextTokenLoss
from .runner import BlockRunner, check_finite, one_by_one
from .temporarily import differentiable, frozen, in_float32, on_device, replaced_forward, weights_device
from .visitor import BlockVisitor


class BackwardRunner(BlockRunner):
    """A runner of backward passes through the blocks of a causal language model.

    Visitors observe each block while it runs forward with gradients enabled, and the backward pass by hooks on the
    outputs of its linears.
    """

    def run_backward(self, visitor: BlockVisitor, loss: NextTokenLoss, description: str = "gradients") -> None:
        """Run all windows forward, and backward from the last block to the first one that the visitor wants.

        `loss` becomes that of all windows; `description` is shown beside the progress bar. ValueError if the model
        gives no next-token logits, no token has a label, the loss or a gradient is not finite (it says where), or the
        loss does not depend on the blocks at all.
        """
        if not any(visitor.wants(name) for name in self._blocks):
            return
        with self._running(visitor), frozen(self.model):
            with torch.no_grad():
                alone = self._blocks_stand_alone()
            # Hidden states in another order (see `tokens`) are those of one window each, so that none has to be split.
            if alone and any(hidden.shape[:2] != (1, len(self._batches[0][0][0])) for hidden in self._hidden):
                self._batches = one_by_one(self._batches)
            (self._backward_by_block if alone else self._full_backward)(visitor, loss, description)

    def _backward_by_block(self, visitor: BlockVisitor, loss: NextTokenLoss, description: str) -> None:
        names = list(self._blocks)
        wanted = [name for name in names if visitor.wants(name)]
        first = names.index(wanted[0])  # blocks before it need no gradient
        with tqdm(total=2 * len(names) - first, desc=description, unit="block") as progress:
            boundaries = self._walk_forward(first, progress)
            gradients = self._loss_gradients(loss)
            loss.check_seen()
            if not any(bool(gradient.any()) for gradient in gradients):
                raise ValueError(_NO_GRADIENT.format(names[-1]))
            for name in reversed(names[first:]):
                watched = name in wanted
                inputs = boundaries.pop(name)
                block = self._blocks[name]
                with on_device(block, self._device):
                    if watched:
                        visitor.enter(name, block)
                    for index, (_, mask) in enumerate(self._batches):
                        if watched:
                            visitor.start_batch(mask)
                        gradients[index] = self._back_through(name, index, inputs[index], gradients[index])
                        check_finite(f"{name}: the loss gradient at its input", gradients[index], mask)
                        inputs[index] = torch.empty(0)
                if watched:
                    visitor.leave(name, block)
                progress.update()

    @torch.no_grad()
    def _walk_forward(self, first: int, progress: tqdm) -> dict[str, list[Tensor]]:
        """Return the inputs of every block from the `first` on (on the CPU); `_hidden` is left at the last outputs."""
        self._record(self._batches)
        if any(hidden.shape[:2] != ids.shape for hidden, (ids, _) in zip(self._hidden, self._batches, strict=True)):
            self._batches = one_by_one(self._batches)
            self._record(self._batches)
        boundaries: dict[str, list[Tensor]] = {}
        for position, (name, block) in enumerate(self._blocks.items()):
            if position >= first:
                boundaries[name] = [hidden.cpu() for hidden in self._hidden]
            with on_device(block, self._device):
                self._advance(name, block)
            progress.update()
        return boundaries

    def _loss_gradients(self, loss: NextTokenLoss) -> list[Tensor]:
        """Return the gradients of the summed loss at the outputs of the last block, by batch, on the CPU.

        Window by window, since the logits of one window can be larger than everything else.
        """
        widens = any(self._in_float32(self.model, hidden.device, hidden.dtype) for hidden in self._hidden)
        # The blocks compute nothing meanwhile. Embeddings tied to the head are the same tensor.
        widened = in_float32(self.model, without=self._blocks.values()) if widens else contextlib.nullcontext()
        gradients = []
        with widened, tqdm(total=sum(map(len, self._hidden)), desc="loss", unit="window", leave=False) as progress:
            for (ids, mask), hidden in zip(self._batches, self._hidden, strict=True):
                windows = []
                parts = hidden.split(1) if len(ids) > 1 else [hidden]
                for window, keep, states in zip(ids.split(1), mask.split(1), parts, strict=True):
                    leaf = (states.detach().float() if widens else states.detach()).requires_grad_(True)
                    with torch.enable_grad(), replaced_forward(self._skipping_blocks(leaf)):
                        loss.of(self.model, window, keep).backward()
                    windows.append(_gradient_of(leaf).to("cpu", hidden.dtype))
                    progress.update()
                gradients.append(torch.cat(windows))
        self._hidden = []
        return gradients

    def _skipping_blocks(self, leaf: Tensor) -> dict[nn.Module, Callable[..., Any]]:
        """Return forwards with which no block computes and the last one returns `leaf`."""
        last = list(self._blocks)[-1]

        def forward_of(name: str) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                # A copy, since a leaf cannot be changed in place.
                hidden = leaf.clone() if name == last else args[0] if args else kwargs["hidden_states"]
                return (hidden,) if name in self._returns_tuple else hidden

            return forward

        return {block: forward_of(name) for name, block in self._blocks.items()}

    def _back_through(self, name: str, index: int, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient at a block's input, given the one at its output, both on the CPU."""
        block = self._blocks[name]
        leaf = hidden.to(weights_device(block) if self._device is None else self._device).requires_grad_(True)
        # Around both: the backward pass reads the weights, too.
        widens = self._in_float32(block, leaf.device, leaf.dtype)
        with in_float32(block) if widens else contextlib.nullcontext(), torch.enable_grad():
            output = differentiable(block, lambda: self._through(name, block, index, leaf))
            output.backward(gradient.to(output))
        return _gradient_of(leaf).cpu()

    def _full_backward(self, visitor: BlockVisitor, loss: NextTokenLoss, description: str) -> None:
        """Run ordinary passes with all blocks visited at once, for models that pass state between their blocks."""

        def ask_for_gradients(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
            if not hidden.requires_grad:
                # No leaf, which a block could not change in place; and no copy, which the model might not know of.
                hidden.add_(torch.zeros((), dtype=hidden.dtype, device=hidden.device, requires_grad=True))

        with self._visiting_all(visitor):
            with contextlib.ExitStack() as hooks:
                for block in self._blocks.values():  # all of them: which one runs first is the model's affair
                    hooks.callback(block.register_forward_pre_hook(ask_for_gradients, with_kwargs=True).remove)
                for ids, mask in tqdm(self._batches, desc=description, unit="batch"):
                    visitor.start_batch(mask)
                    with torch.enable_grad():
                        loss.of(self.model, ids, mask).backward()
            loss.check_seen()


_NO_GRADIENT = (
    "the loss gradient after {}, the last block, is zero on every calibration token, so that no matrix has importance "
    "scores: calibrate on other text, or choose a method that reads no gradients (svd_llm_v2)"
)


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
