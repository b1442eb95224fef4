"""Statistics of the loss gradients at the outputs of a block's linears, summed during a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.linears import weight_matrix
from ..model.offloaded import dense_bias
from .collect import token_rows
from .packing import pack

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
        joint_energy: `sum ||x||^2 ||g||^2`, the trace of the matrix's Fisher information. Divided by
            `sum ||x||^2 sum ||g||^2 / tokens` it tells how far `x` and `g` are from independent, which K-FAC assumes.
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


class _Sums:
    """Sums in float64 over batches; each batch's product is formed in float32 (float64 for float64 models)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.tokens = 0
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.scalars = torch.zeros(len(SCALARS), dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor, gradient: Tensor) -> None:
        """Add a batch: `x` is `tokens x n`, `y` and `gradient` are `tokens x m`."""
        x, y, gradient = (each if each.dtype == torch.float64 else each.float() for each in (x, y, gradient))
        self.tokens += len(gradient)
        self.gram += gradient.T @ gradient
        energy, scaled = gradient.square().sum(1), (gradient * y).sum(1)
        found = [energy.sum(), (energy * x.square().sum(1)).sum(), scaled.sum(), scaled.square().sum()]
        self.scalars += torch.stack(found).double().cpu()

    def result(self, name: str) -> GradientStatistics:
        """Return the statistics. ValueError, naming the linear, if a value is not finite or all are zero."""
        if not bool(torch.isfinite(self.scalars).all() and torch.isfinite(self.gram.diagonal()).all()):
            raise ValueError(
                f"{name}: the loss gradients at its output have NaN or infinite values. Load the model in float32 or "
                "bfloat16 (float16 overflows)"
            )
        if not self.tokens or not float(self.gram.diagonal().sum()) > 0:
            raise ValueError(
                f"{name}: the loss gradient at its output is zero on every calibration token, so its directions have "
                "no importance scores: calibrate on more text, or list it in modules_to_not_convert"
            )
        values = dict(zip(SCALARS, self.scalars.tolist(), strict=True))
        return GradientStatistics(len(self.gram), self.tokens, pack(self.gram.cpu()), **values)


class GradientCollector:
    """A block visitor for backward passes that sums `GradientStatistics` of a block's linears.

    Args:
        linears_of: block name -> its linears by full name.
        finished: called with block name and the statistics by linear name after each block.
        wanted: block name -> whether to collect it.
    """

    def __init__(
        self,
        linears_of: Callable[[str], dict[str, nn.Module]],
        finished: Callable[[str, dict[str, GradientStatistics]], None],
        wanted: Callable[[str], bool],
    ) -> None:
        self._linears_of = linears_of
        self._finished = finished
        self._wanted = wanted
        self._mask: Tensor | None = None
        self._biases: dict[str, Tensor | None] = {}
        self._open: dict[str, tuple[list[Any], dict[str, _Sums]]] = {}

    def wants(self, name: str) -> bool:
        return self._wanted(name) and bool(self._linears_of(name))

    def enter(self, name: str, block: nn.Module) -> None:
        linears = self._linears_of(name)
        self._biases |= {linear: dense_bias(module) for linear, module in linears.items()}
        handles = [
            module.register_forward_hook(partial(self._observe, name, linear), with_kwargs=True)
            for linear, module in linears.items()
        ]
        self._open[name] = (handles, {})

    def start_batch(self, mask: Tensor) -> None:
        self._mask = mask

    def _observe(
        self, block: str, linear: str, module: Any, args: tuple, kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        if not output.requires_grad:
            return
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        bias = self._biases[linear]
        y = output.detach() if bias is None else output.detach() - bias.to(output)
        mask = self._mask
        sums = self._open[block][1]
        if linear not in sums:
            sums[linear] = _Sums(weight_matrix(module).shape[0], output.device)

        def add(gradient: Tensor) -> None:
            sums[linear].add(*(token_rows(linear, each, mask) for each in (x, y, gradient.detach())))

        output.register_hook(add)

    def leave(self, name: str, block: nn.Module) -> None:
        handles, sums = self._open.pop(name)
        _remove(handles)
        found = {}
        for linear in self._linears_of(name):
            self._biases.pop(linear)
            found[linear] = sums.get(linear, _Sums(1, torch.device("cpu"))).result(linear)
        self._finished(name, found)

    def abandon(self) -> None:
        for handles, _ in self._open.values():
            _remove(handles)
        self._open.clear()
        self._biases.clear()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
