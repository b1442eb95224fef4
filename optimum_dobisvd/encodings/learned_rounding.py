"""Codes that are learned: signed gradient descent on rounding offsets and grids (SignRound, arXiv 2309.05516)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LARGEST_OFFSET = 0.5


@dataclass(frozen=True)
class LearnedRoundingSettings:
    """How codes are learned.

    Attributes:
        steps: of descent in every block.
        nsamples, seqlen: windows of text, and tokens in each; None: those of the compression.
        batch_size: windows in a step.
        learning_rate: of the first step; it falls linearly to zero. None: `1 / steps`, with which an offset can go
            from one end of its range to the other.
    """

    steps: int = 200
    nsamples: int | None = None
    seqlen: int | None = None
    batch_size: int = 8
    learning_rate: float | None = None


class LearnableLinear(nn.Module):
    """A linear that computes with its weight rounded to a uniform grid, while the rounding is learned.

    `offsets` (`m x n`, from -1/2 to 1/2) are added to a weight in units of its step before it is rounded; `lowest` and
    `highest` (`m x groups x 1`, from 0 to 1) say how much of the range of a group's values its grid spans. Gradients
    pass through the rounding as if it were not there.

    Args:
        linear: its weight is `m x n`, in any floating dtype.
        bits: of a code.
        group_size: neighboring inputs of an output that share a grid, a divisor of `n`.
        symmetric: whether the grid reaches as far below zero as above.
    """

    def __init__(self, linear: nn.Linear, bits: int, group_size: int, symmetric: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.symmetric = bits, symmetric
        weight = linear.weight.detach().float()
        self.register_buffer("_groups", weight.reshape(len(weight), -1, group_size), persistent=False)
        self.bias = linear.bias
        one_each = torch.ones_like(self._groups[..., :1])
        self.offsets = nn.Parameter(torch.zeros_like(self._groups))
        self.lowest, self.highest = nn.Parameter(one_each), nn.Parameter(one_each.clone())

    _groups: Tensor

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return step (in float16, as it is stored) and zero point (a whole number) of every group."""
        if self.symmetric:
            reach = self._groups.abs().amax(-1, keepdim=True) * self.highest
            below, above = -reach, reach
        else:
            below = self._groups.amin(-1, keepdim=True).clamp_max(0) * self.lowest
            above = self._groups.amax(-1, keepdim=True).clamp_min(0) * self.highest
        step = (above - below) / self._largest
        step = _straight_through(step, step.half().float())
        step = torch.where(step > 0, step, 1)
        if self.symmetric:
            return step, torch.full_like(step, 2 ** (self.bits - 1))
        zero = -below / step
        return step, _straight_through(zero, zero.round()).clamp(0, self._largest)

    def codes(self, step: Tensor, zero: Tensor) -> Tensor:
        """Return the code of every value on that grid, `m x groups x group_size`, floats of whole numbers."""
        shifted = self._groups / step + self.offsets
        return (_straight_through(shifted, shifted.round()) + zero).clamp(0, self._largest)

    @property
    def weight(self) -> Tensor:
        """The rounded weight, `m x n`, float32, with a gradient."""
        step, zero = self.grid()
        return ((self.codes(step, zero) - zero) * step).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)

    @property
    def _largest(self) -> int:
        return 2**self.bits - 1


class SignedDescent:
    """Descent by the sign of the gradient, each number of a rounding by the same step, kept in its range.

    The rounding with the least loss is remembered.
    """

    def __init__(self, linears: Iterable[LearnableLinear], settings: LearnedRoundingSettings) -> None:
        self._linears = list(linears)
        self._parameters = [parameter for linear in self._linears for parameter in _learned(linear)]
        self._steps, self._done = settings.steps, 0
        self._rate = 1 / settings.steps if settings.learning_rate is None else settings.learning_rate
        self._least, self._best = float("inf"), [parameter.detach().clone() for parameter in self._parameters]

    def step(self, loss: Tensor) -> None:
        """Take the loss back and move; `loss` is of the rounding as it was before."""
        value = float(loss.detach())
        if value < self._least:
            self._least = value
            for best, parameter in zip(self._best, self._parameters, strict=True):
                best.copy_(parameter.detach())
        loss.backward()
        rate = self._rate * (1 - self._done / self._steps)
        with torch.no_grad():
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign_(), alpha=rate)
                    parameter.grad = None
            for linear in self._linears:
                linear.offsets.clamp_(-_LARGEST_OFFSET, _LARGEST_OFFSET)
                linear.lowest.clamp_(0, 1)
                linear.highest.clamp_(0, 1)
        self._done += 1

    @torch.no_grad()
    def take_best(self) -> None:
        """Go back to the rounding with the least loss."""
        for best, parameter in zip(self._best, self._parameters, strict=True):
            parameter.copy_(best)


def _learned(linear: LearnableLinear) -> tuple[nn.Parameter, ...]:
    return linear.offsets, linear.lowest, linear.highest


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded` with the gradient of `value`."""
    return value + (rounded - value).detach()
