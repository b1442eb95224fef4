"""Statistics of the inputs of a block's linears, summed while calibration text runs through it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..calibration.tokens import token_places, token_rows
from ..calibration.visitor import LinearsVisitor
from ..model.experts import ROUTED_ROWS, RoutedRows
from ..model.linears import weight_matrix
from .packing import add_to_upper_triangle, pack, packed_length
from .pooling import borrowers, pool_name, pools


@dataclass
class InputStatistics:
    """Statistics of one input of `size` (`n`) features over `tokens` tokens, shared by the linears that read it.

    `abs_mean` is `mean |x_j|`, `n` values; `gram` the packed upper triangle of `H = X X^T`, `n(n+1)/2`; both float32.
    Without tokens, of a block that hands its input on, they are zero.
    """

    size: int
    tokens: int
    abs_mean: Tensor
    gram: Tensor


@dataclass
class BlockStatistics:
    """Statistics of one block's inputs, each by its key: the name of the first linear that reads it, or of a pool.

    `input_key` is that key for every linear of the block.
    """

    inputs: dict[str, InputStatistics]
    input_key: dict[str, str]

    @property
    def borrowed(self) -> list[str]:
        """Linears that were given too few tokens, and have the statistics of their pool."""
        return [name for name, key in self.input_key.items() if key not in self.input_key]

    @property
    def routed(self) -> set[str]:
        """Keys of inputs that are not of all the block's tokens, but of those that a router sends there."""
        most = max((each.tokens for key, each in self.inputs.items() if key in self.input_key), default=0)
        return {key for key, each in self.inputs.items() if key not in self.input_key or each.tokens < most}


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

    def merge(self, other: _Accumulator) -> None:
        """Add what another one has summed."""
        self.tokens += other.tokens
        self.abs_sum += other.abs_sum.to(self.abs_sum.device)
        self.gram += other.gram.to(self.gram.device)

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

    Linears that read the same tensor (q/k/v, gate/up) share one sum, under the name of the first one called. A tensor
    that was changed in place between them is not the same.

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
        self.needs_token_order = weights_of is not None
        self._run: set[str] = set()  # blocks
        self._called: set[str] = set()  # linears, in the pass under way
        self._input_key: dict[str, str] = {}
        # block -> input key -> its input in the pass under way, and its version then
        self._current: dict[str, dict[str, tuple[Tensor, int]]] = {}

    def enter(self, name: str, block: nn.Module) -> None:
        super().enter(name, block)
        self._hooks.callback(block.register_forward_pre_hook(lambda *_: self._run.add(name)).remove)

    def start_batch(self, mask: Tensor) -> None:
        super().start_batch(mask)
        self._current, self._called = {}, set()

    def _hook(self, block: str, linear: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(partial(self._observe, block, linear), with_kwargs=True)

    def _observe(self, block: str, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        current = self._current.setdefault(block, {})
        again = name in self._called
        if again:
            self._share_no_more(name, current)
        self._called.add(name)
        if name not in self._input_key:
            self._input_key[name] = next((key for key, seen in current.items() if _is_same(x, seen)), name)
        input_key = self._input_key[name]
        if input_key != name:
            if input_key not in current or not _is_same(x, current[input_key]):
                raise _differs(name, input_key)
            return
        if not again:
            current[name] = x, _version(x)
        if name not in self._sums:
            self._sums[name] = _Accumulator(weight_matrix(module).shape[1], x.device)
        routed = ROUTED_ROWS.get()
        rows = token_rows(name, x.detach(), self._mask, routed)
        self._sums[name].add(rows, self._row_weights(x.shape[:-1], routed))

    def _share_no_more(self, name: str, current: dict[str, tuple[Tensor, int]]) -> None:
        """Give a linear that a pass calls again a sum of its own: the inputs are no longer those of the others."""
        shared = self._input_key[name]
        others = [other for other, key in self._input_key.items() if key == shared and other != name]
        seen = current.pop(name, None)  # and nobody else is to share what it reads by and by
        if not others:
            return
        leaving = others if shared == name else [name]
        if not set(leaving) <= self._called:  # their sum has what they have not read yet
            raise _differs(leaving[0], shared)
        self._sums[leaving[0]] = copy.deepcopy(self._sums[shared])  # equal so far
        self._input_key |= dict.fromkeys(leaving, leaving[0])
        if shared == name and seen is not None:
            current[leaving[0]] = seen

    def _row_weights(self, shape: torch.Size, routed: RoutedRows | None) -> Tensor | None:
        """Return how many tokens each row of `token_rows` counts as, of an input of this shape; None is one each.

        None, too, where it is not known which tokens the rows are. It is known of an expert's, but not where modeling
        code gathers them itself, and the same is to come of both.
        """
        if self._weights_of is None or self._mask is None or routed is not None:
            return None
        weights, kept = self._weights_of(self._mask).reshape(-1, 1).cpu(), self._mask.reshape(-1).cpu()
        places = token_places(shape, self._mask)
        if places is None:
            return None
        weights = weights.expand_as(places)
        if not bool(kept.all()):  # rows are in the order of the places then
            return weights[kept].flatten()
        return weights.flatten()[places.flatten().argsort()]

    def _result(self, block: str) -> BlockStatistics:
        self._current = {}
        linears = self._linears_of(block)
        keys = {name: key for name, key in self._input_key.items() if name in linears}  # in the order of the calls
        for name in keys:
            del self._input_key[name]
        if not keys and block in self._run:  # the block hands its input on
            return BlockStatistics(
                {name: _nothing(module) for name, module in linears.items()}, {n: n for n in linears}
            )
        sums = {key: self._sums.pop(key) for name, key in keys.items() if key == name}
        pooled = self._borrow(block, keys, sums)
        unseen = [name for name in linears if name not in keys]
        if unseen:
            raise ValueError(
                f"{unseen[0]} was never called during calibration ({len(unseen)} such linears in its block): "
                "calibrate on more text, or list it in modules_to_not_convert"
            )
        inputs = {key: sums[key].result(key) for key in dict.fromkeys(keys.values()) if key in sums}
        return BlockStatistics(inputs | {key: each.result(key) for key, each in pooled.items()}, keys)

    def _borrow(self, block: str, keys: dict[str, str], sums: dict[str, _Accumulator]) -> dict[str, _Accumulator]:
        """Give linears that saw too few tokens their pool's key in `keys`; returns what these pools have summed."""
        linears = self._linears_of(block)
        tokens = {name: sums[key].tokens for name, key in keys.items()}
        sizes = {name: weight_matrix(module).shape[1] for name, module in linears.items()}
        found: dict[str, _Accumulator] = {}
        for members in pools(block, sizes).values():
            borrowing = borrowers(members, tokens, sizes[members[0]], self._tokens[block])
            if not borrowing:
                continue
            lenders = dict.fromkeys(keys[name] for name in members if name in keys)
            pool = pool_name(block, next(iter(lenders)))
            if pool not in found:
                found[pool] = _Accumulator(sizes[members[0]], next(iter(sums.values())).gram.device)
                for key in lenders:
                    found[pool].merge(sums[key])
            keys |= dict.fromkeys((name for name in members if name in borrowing), pool)
        return found

    def abandon(self) -> None:
        super().abandon()
        self._input_key, self._current = {}, {}


def _nothing(linear: nn.Module) -> InputStatistics:
    """Return the statistics of a linear that its block does without."""
    size = weight_matrix(linear).shape[1]
    return InputStatistics(size, 0, torch.zeros(size), torch.zeros(packed_length(size)))


def _differs(one: str, other: str) -> ValueError:
    return ValueError(
        f"{one} and {other} shared their input in one batch and not in another: list them in modules_to_not_convert"
    )


def _is_same(x: Tensor, seen: tuple[Tensor, int]) -> bool:
    return x is seen[0] and _version(x) == seen[1]


def _version(x: Tensor) -> int:
    """Return how often a tensor was changed in place; tensors of inference mode, which do not count, are at 0."""
    return 0 if x.is_inference() else x._version
