"""Statistics of the inputs of a block's linears, summed while calibration text runs through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..calibration.visitor import LinearsVisitor
from ..model.linears import weight_matrix
from .packing import add_to_upper_triangle, pack


@dataclass
class InputStatistics:
    """Statistics of one input of `size` (`n`) features over `tokens` tokens, shared by the linears that read it.

    `abs_mean` is `mean |x_j|`, `n` values; `gram` the packed upper triangle of `H = X X^T`, `n(n+1)/2`; both float32.
    """

    size: int
    tokens: int
    abs_mean: Tensor
    gram: Tensor


@dataclass
class BlockStatistics:
    """Statistics of one block's inputs, each by its key: the name of the first linear that reads it.

    `input_key` is that key for every linear of the block.
    """

    inputs: dict[str, InputStatistics]
    input_key: dict[str, str]


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
        add_to_upper_triangle(self.gram, x, x if weights is None else weights[:, None].to(x) * x)

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


class InputCollector(LinearsVisitor):
    """A block visitor that sums the statistics of the inputs of a block's linears, for `BlockStatistics`.

    Linears that read the same tensor (q/k/v, gate/up) share one sum, under the name of the first one called.

    Args:
        linears_of, finished, wanted: see `LinearsVisitor`.
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
        super().__init__(linears_of, finished, wanted)
        self._weights_of = weights_of
        self._weights: Tensor | None = None
        self._input_key: dict[str, str] = {}
        self._current: dict[str, dict[str, Tensor]] = {}  # block -> input key -> its input in the pass under way

    def start_batch(self, mask: Tensor) -> None:
        super().start_batch(mask)
        self._weights = None if self._weights_of is None else self._weights_of(mask)[mask]
        self._current = {}

    def _hook(self, block: str, linear: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(partial(self._observe, block, linear), with_kwargs=True)

    def _observe(self, block: str, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        current = self._current.setdefault(block, {})
        if name not in self._input_key:
            self._input_key[name] = next((key for key, seen in current.items() if seen is x), name)
        input_key = self._input_key[name]
        if input_key != name:
            if current.get(input_key) is not x:
                raise ValueError(f"{name} and {input_key} shared their input in one batch and not in another")
            return
        current[name] = x
        if name not in self._sums:
            self._sums[name] = _Accumulator(weight_matrix(module).shape[1], x.device)
        rows = token_rows(name, x.detach(), self._mask)
        # Of linears that read only some of the tokens (experts) it is not known which ones.
        weighted = self._weights is not None and len(self._weights) == len(rows)
        self._sums[name].add(rows, self._weights if weighted else None)

    def _result(self, block: str) -> BlockStatistics:
        self._current = {}
        linears = self._linears_of(block)
        unseen = [name for name in linears if name not in self._input_key]
        if unseen:
            raise ValueError(
                f"{unseen[0]} was never called during calibration ({len(unseen)} such linears in its block): "
                "calibrate on more text, or list it in modules_to_not_convert"
            )
        keys = {name: key for name, key in self._input_key.items() if name in linears}  # in the order of the calls
        for name in keys:
            del self._input_key[name]
        inputs = {name: self._sums.pop(name).result(name) for name, key in keys.items() if key == name}
        return BlockStatistics(inputs, keys)

    def abandon(self) -> None:
        super().abandon()
        self._input_key, self._current = {}, {}


def token_rows(name: str, activations: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of a linear's input or output (`... x features`) that are no padding, `tokens x features`.

    `mask` (`batch x seqlen`) is True for those; None is all. ValueError, naming the linear, if there is padding and
    the rows are not one for every position of the batch.
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
