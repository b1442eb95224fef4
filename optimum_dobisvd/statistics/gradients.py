"""Statistics of the loss gradients at the outputs of a block's linears, summed during a backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..calibration.tokens import token_rows
from ..calibration.visitor import LinearsVisitor
from ..model.experts import ROUTED_ROWS
from ..model.linears import weight_matrix
from ..model.offloaded import dense_bias
from .collect import InputStatistics
from .packing import add_to_upper_triangle, pack, packed_diagonal
from .pooling import borrowers, pools

SCALARS = ("energy", "joint_energy", "first_order", "second_order")


@dataclass
class GradientStatistics:
    """Second moments of the loss gradient `g` at one linear's output, one `g` per token, summed over tokens.

    With `x` the linear's input and `y = W x` its output without the bias, all sums over tokens:

    Attributes:
        size: `m`, the features of the output.
        tokens: how many tokens are summed.
        gram: packed upper triangle of `G = sum g g^T`, `m(m+1)/2` values, float32.
        energy: `sum ||g||^2`, the trace of `G`.
        joint_energy: `sum ||x||^2 ||g||^2`, the trace of the matrix's Fisher information.
        first_order: `sum g . y`, the derivative of the loss by a scale of the matrix.
        second_order: `sum (g . y)^2`, the Fisher information of that scale.
    """

    size: int
    tokens: int
    gram: Tensor
    energy: float
    joint_energy: float
    first_order: float
    second_order: float

    def dependence(self, inputs: InputStatistics) -> float:
        """Return the trace of the matrix's Fisher information as a share of what K-FAC takes it for.

        Below 1 where tokens with large inputs have small gradients; 1 where either is zero.
        """
        input_energy = float(packed_diagonal(inputs.gram, inputs.size).double().sum()) / max(inputs.tokens, 1)
        return self.joint_energy / (self.energy * input_energy) if self.energy * input_energy > 0 else 1.0


class _Sums:
    """Sums in float64 over batches; each batch's product is formed in float32 (float64 for float64 models)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.tokens = 0
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.scalars = torch.zeros(len(SCALARS), dtype=torch.float64)

    def add(self, input_energy: Tensor, y: Tensor, gradient: Tensor) -> None:
        """Add a batch: `input_energy` is `||x||^2` of every token, `y` and `gradient` are `tokens x m`."""
        y, gradient = _precise(y), _precise(gradient)
        self.tokens += len(gradient)
        add_to_upper_triangle(self.gram, gradient, gradient)
        energy, scaled = gradient.square().sum(1), (gradient * y).sum(1)
        found = [energy.sum(), (energy * input_energy).sum(), scaled.sum(), scaled.square().sum()]
        self.scalars += torch.stack(found).double().cpu()

    def merge(self, other: _Sums) -> None:
        """Add what another one has summed."""
        self.tokens += other.tokens
        self.gram += other.gram.to(self.gram.device)
        self.scalars += other.scalars

    def scaled_to(self, tokens: int) -> _Sums:
        """Return what the same sums would be over another number of tokens of the same kind."""
        scaled = _Sums(len(self.gram), self.gram.device)
        scaled.tokens = tokens
        scaled.gram, scaled.scalars = self.gram * (tokens / self.tokens), self.scalars * (tokens / self.tokens)
        return scaled

    def result(self, name: str) -> GradientStatistics:
        """Return the statistics. ValueError, naming the linear, if a value is not finite.

        All may be zero: the loss does not feel the linear, so that nothing of it is worth a byte.
        """
        if not bool(torch.isfinite(self.scalars).all() and torch.isfinite(self.gram.diagonal()).all()):
            raise ValueError(
                f"{name}: the loss gradients at its output have NaN or infinite values. Load the model in float32 or "
                "bfloat16 (float16 overflows)"
            )
        values = dict(zip(SCALARS, self.scalars.tolist(), strict=True))
        return GradientStatistics(len(self.gram), self.tokens, pack(self.gram.cpu()), **values)


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


class GradientCollector(LinearsVisitor):
    """A block visitor for backward passes that sums `GradientStatistics` of a block's linears, by their names."""

    def wants(self, name: str) -> bool:
        return super().wants(name) and bool(self._linears_of(name))

    def _hook(self, block: str, linear: str, module: nn.Module) -> RemovableHandle:
        observe = partial(self._observe, linear, dense_bias(module))
        return module.register_forward_hook(observe, with_kwargs=True)

    def _observe(
        self, linear: str, bias: Tensor | None, module: Any, args: tuple, kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        """Hook the output, and return a copy in its place: the model may change in place what it goes on with."""
        if not output.requires_grad:
            return output
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        mask, routed = self._mask, ROUTED_ROWS.get()
        energy = _precise(token_rows(linear, x, mask, routed)).square().sum(1)  # now, while it is what it is
        if linear not in self._sums:
            self._sums[linear] = _Sums(weight_matrix(module).shape[0], output.device)
        sums = self._sums[linear]

        def add(gradient: Tensor) -> None:
            y = output.detach() if bias is None else output.detach() - bias.to(output)
            sums.add(energy, token_rows(linear, y, mask, routed), token_rows(linear, gradient, mask, routed))

        output.register_hook(add)
        return output.clone()

    def _result(self, block: str) -> dict[str, GradientStatistics]:
        linears, sums = self._linears_of(block), {}
        for name, module in linears.items():
            sums[name] = self._sums.pop(name, None) or _Sums(weight_matrix(module).shape[0], torch.device("cpu"))
        sums |= self._borrowed(block, sums)
        return {linear: sums[linear].result(linear) for linear in linears}

    def _borrowed(self, block: str, sums: dict[str, _Sums]) -> dict[str, _Sums]:
        """Sums of linears that saw too few tokens: their pool's mean, for the tokens they saw, or for one."""
        sizes = {name: weight_matrix(module).shape[0] for name, module in self._linears_of(block).items()}
        tokens = {name: each.tokens for name, each in sums.items()}
        found: dict[str, _Sums] = {}
        for members in pools(block, sizes).values():
            borrowing = borrowers(members, tokens, sizes[members[0]], self._tokens[block])
            if not borrowing:
                continue
            pool = _Sums(sizes[members[0]], next(sums[name].gram.device for name in members if tokens[name]))
            for name in members:
                if tokens[name]:
                    pool.merge(sums[name])
            found |= {name: pool.scaled_to(max(tokens[name], 1)) for name in borrowing}
        return found
