"""Statistics of the inputs of a block's linears, summed while calibration text runs through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..model.linears import weight_matrix
from .packing import pack


@dataclass
class InputStatistics:
    """Statistics of one input, shared by the linears that read it.

    Attributes:
        size: `n`, the features of the input.
        tokens: how many tokens are summed.
        abs_mean: `mean |x_j|`, `n` values, float32.
        gram: packed upper triangle of `H = X X^T`, `n(n+1)/2` values, float32.
    """

    size: int
    tokens: int
    abs_mean: Tensor
    gram: Tensor


@dataclass
class BlockStatistics:
    """Statistics of one block.

    Attributes:
        inputs: by shared-input key, the name of the first linear that reads the input.
        input_key: that key for every linear of the block.
    """

    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    input_key: dict[str, str] = field(default_factory=dict)


class _Accumulator:
    """Sums in float64 over batches; each batch's product is formed in float32 (float64 for float64 models)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.tokens = 0
        self.abs_sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        """Add a batch: `x` is `tokens x n`; `weights` (`tokens`) is how many tokens each counts as in the Gram."""
        x = x if x.dtype == torch.float64 else x.float()
        self.tokens += len(x)
        self.abs_sum += x.abs().sum(0)
        self.gram += x.T @ (x if weights is None else weights[:, None].to(x) * x)

    def result(self, name: str) -> InputStatistics:
        """Return the statistics. ValueError, naming the linear, if there was no token or a value is not finite."""
        if self.tokens == 0:
            raise ValueError(
                f"{name} saw no calibration token (a router may never choose it): calibrate on more text, or list it "
                "in modules_to_not_convert"
            )
        if not bool(torch.isfinite(self.abs_sum).all() and torch.isfinite(self.gram.diagonal()).all()):
            raise ValueError(
                f"{name}: its inputs have NaN or infinite values. Check the checkpoint, or load the model in float32 "
                "or bfloat16 (float16 overflows)"
            )
        mean = (self.abs_sum / self.tokens).float().cpu()
        return InputStatistics(len(self.abs_sum), self.tokens, mean, pack(self.gram.cpu()))


class InputCollector:
    """A block visitor that sums the statistics of the inputs of a block's linears.

    Linears that read the same tensor (q/k/v, gate/up) share one sum, under the name of the first one called.

    Args:
        linears_of: block name -> its linears by full name.
        finished: called with block name and `BlockStatistics` after each block.
        wanted: block name -> whether to collect it.
        weights_of: token mask of a batch -> how many tokens each one counts as in the Grams, both `batch x seqlen`;
            without it, each counts as one.
    """

    def __init__(
        self,
        linears_of: Callable[[str], dict[str, nn.Module]],
        finished: Callable[[str, BlockStatistics], None],
        wanted: Callable[[str], bool],
        weights_of: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._linears_of = linears_of
        self._finished = finished
        self._wanted = wanted
        self._weights_of = weights_of
        self._open: dict[str, _OpenBlock] = {}

    def wants(self, name: str) -> bool:
        return self._wanted(name)

    def enter(self, name: str, block: nn.Module) -> None:
        self._open[name] = _OpenBlock(self._linears_of(name))

    def start_batch(self, mask: Tensor) -> None:
        weights = None if self._weights_of is None else self._weights_of(mask)
        for block in self._open.values():
            block.start_batch(mask, weights)

    def leave(self, name: str, block: nn.Module) -> None:
        opened = self._open.pop(name)
        opened.detach()
        self._finished(name, opened.statistics())

    def abandon(self) -> None:
        for opened in self._open.values():
            opened.detach()
        self._open.clear()


class _OpenBlock:
    """Hooks and sums of one block while it runs."""

    def __init__(self, linears: dict[str, nn.Module]) -> None:
        self._linears = linears
        self._mask: Tensor | None = None
        self._weights: Tensor | None = None
        self._input_key: dict[str, str] = {}
        self._sums: dict[str, _Accumulator] = {}
        self._current: dict[str, Tensor] = {}  # input key -> its input in the forward pass under way
        self._handles = [
            module.register_forward_pre_hook(partial(self._observe, name), with_kwargs=True)
            for name, module in linears.items()
        ]

    def start_batch(self, mask: Tensor, weights: Tensor | None) -> None:
        self._mask, self._weights = mask, None if weights is None else weights[mask]
        self._current = {}

    def _observe(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if name not in self._input_key:
            self._input_key[name] = next((key for key, seen in self._current.items() if seen is x), name)
        input_key = self._input_key[name]
        if input_key != name:
            if self._current.get(input_key) is not x:
                raise ValueError(f"{name} and {input_key} shared their input in one batch and not in another")
            return
        self._current[name] = x
        if name not in self._sums:
            self._sums[name] = _Accumulator(weight_matrix(module).shape[1], x.device)
        rows = token_rows(name, x.detach(), self._mask)
        # Of linears that read only some of the tokens (experts) it is not known which ones.
        weighted = self._weights is not None and len(self._weights) == len(rows)
        self._sums[name].add(rows, self._weights if weighted else None)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def statistics(self) -> BlockStatistics:
        unseen = [name for name in self._linears if name not in self._input_key]
        if unseen:
            raise ValueError(
                f"{unseen[0]} was never called during calibration ({len(unseen)} such linears in its block): "
                "calibrate on more text, or list it in modules_to_not_convert"
            )
        return BlockStatistics({name: sums.result(name) for name, sums in self._sums.items()}, dict(self._input_key))


def token_rows(name: str, activations: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of a linear's input or output that are no padding, `tokens x features`.

    Args:
        name: of the linear, for messages.
        activations: `... x features`, one row for every position of the batch.
        mask: which positions are no padding, `batch x seqlen`; None if all are.

    Raises:
        ValueError: there is padding, and the rows are not those of the batch.
    """
    flat = activations.reshape(-1, activations.shape[-1])
    if mask is None or bool(mask.all()):
        return flat
    if len(flat) != mask.numel():
        raise ValueError(
            f"{name} is given {len(flat)} rows where the batch has {mask.numel()} tokens, so padding cannot be "
            "told from text; calibrate on windows without padding"
        )
    return flat[mask.reshape(-1).to(flat.device)]
