"""Codes that are learned: signed gradient descent on rounding offsets and grids (SignRound, arXiv 2309.05516)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

_LARGEST_OFFSET = 0.5
RANGE_STEPS, RANGES_TRIED = 20, 12
_RANGES = tuple(1 - step / RANGE_STEPS for step in range(RANGES_TRIED))
"""Shares of the range of a group's values that a grid is tried with."""


@dataclass(frozen=True)
class LearnedRoundingSettings:
    """How codes are learned.

    Attributes:
        steps: of descent in every block.
        nsamples, seqlen: windows of text, and tokens in each; None: those of the compression.
        batch_size: windows in a step.
        learning_rate: of the first step; it falls linearly to zero. None: `1 / steps`, with which an offset can go
            from one end of its range to the other.
        rest_learning_rate: of what a block computes with unrounded (norms, biases, 16-bit linears), by Adam, falling
            in the same way; None: that stays as it is.

    Raises:
        ValueError: a number that cannot be; names the setting.
    """

    steps: int = 200
    nsamples: int | None = None
    seqlen: int | None = None
    batch_size: int = 8
    learning_rate: float | None = None
    rest_learning_rate: float | None = None

    _optional: ClassVar = ("nsamples", "seqlen", "learning_rate", "rest_learning_rate")
    _rates: ClassVar = ("learning_rate", "rest_learning_rate")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None and name in self._optional:
                continue
            rate = name in self._rates
            fits = isinstance(value, int | float if rate else int) and not isinstance(value, bool)
            if not (fits and value > 0):
                kind = "a number above 0" if rate else "a whole number of at least 1"
                raise ValueError(f"{name} of learned rounding must be {kind}, got {value!r}")


class LearnableLinear(nn.Module, ABC):
    """A linear that computes with its weight rounded to a grid, while the rounding is learned.

    `offsets` (`m x groups x group_size`, from -1/2 to 1/2) are added to a weight in units of its grid's step before it
    is rounded; `lowest` and `highest` (`m x groups x 1`, from 0 to 1) say how much of the range of a group's values
    the grid spans. Gradients pass through the rounding as if it were not there. It begins as the nearest rounding on a
    grid that spans all of them.

    Args:
        linear: its weight is `m x n`, in any floating dtype.
        group_size: neighboring inputs of an output that share a grid, a divisor of `n`.
        dtype: the model's.
    """

    def __init__(self, linear: nn.Linear, group_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, dtype
        weight = linear.weight.detach().float()
        self.register_buffer("_groups", weight.reshape(len(weight), -1, group_size), persistent=False)
        self.bias = linear.bias
        one_each = torch.ones_like(self._groups[..., :1])
        self.offsets = nn.Parameter(torch.zeros_like(self._groups))
        self.lowest, self.highest = nn.Parameter(one_each), nn.Parameter(one_each.clone())

    _groups: Tensor

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The rounded weight, `m x n`, float32, with a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)

    def plain(self) -> nn.Linear:
        """Return a plain linear of the rounded weight, float32, with the same bias."""
        with torch.no_grad():
            weight = self.weight.detach()
        rounded = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        rounded.weight, rounded.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return rounded

    def learned(self) -> tuple[nn.Parameter, ...]:
        """Return what is learned of the rounding."""
        return self.offsets, self.lowest, self.highest

    @torch.no_grad()
    def fit_ranges(self, moments: Tensor) -> None:
        """Begin with the grid of every group on which nearest rounding loses least: a few steps do not find it.

        First both ends are moved together, then each by itself.

        Args:
            moments: mean square of every input (`n`): what the square of an error there counts.
        """
        felt = moments.to(self._groups).view(1, -1, self._groups.shape[-1])
        best = self._lost(felt)
        for moved in ((self.lowest, self.highest), (self.highest,), (self.lowest,)):
            found = [end.detach().clone() for end in moved]
            for share in _RANGES:
                for end in moved:
                    end.fill_(share)
                lost = self._lost(felt)
                for each in found:
                    each[lost < best] = share
                best = torch.minimum(best, lost)
            for end, value in zip(moved, found, strict=True):
                end.copy_(value)

    def _lost(self, felt: Tensor) -> Tensor:
        """Return what rounding loses in every group, `m x groups x 1`."""
        return ((self.weight.view_as(self._groups) - self._groups).square() * felt).sum(-1, keepdim=True)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Bring offsets and ranges back to where they may be."""
        self.offsets.clamp_(-_LARGEST_OFFSET, _LARGEST_OFFSET)
        self.lowest.clamp_(0, 1)
        self.highest.clamp_(0, 1)


class SignedDescent:
    """Descent by the sign of the gradient, each number of a rounding by the same step, kept in its range.

    What is best is remembered: the rounding with the least loss, and what was trained along with it.

    Args:
        linears: whose rounding is learned.
        settings: of the descent.
        rest: parameters that are trained along by Adam, on copies in float32.
    """

    def __init__(
        self,
        linears: Iterable[LearnableLinear],
        settings: LearnedRoundingSettings,
        rest: Iterable[nn.Parameter] = (),
    ) -> None:
        self._linears, self._rest = list(linears), list(rest)
        self._rounding = [parameter for linear in self._linears for parameter in linear.learned()]
        self._steps, self._done = settings.steps, 0
        self._rate = 1 / settings.steps if settings.learning_rate is None else settings.learning_rate
        self._rest_rate = settings.rest_learning_rate or 0.0
        self._masters = [each.detach().float().clone() for each in self._rest]
        self._adam = torch.optim.Adam(self._masters, lr=self._rest_rate) if self._rest else None
        self._least, self._best = float("inf"), [each.detach().clone() for each in self._parameters]

    def step(self, loss: Tensor) -> None:
        """Take the loss back and move; `loss` is of the rounding as it was before."""
        value = float(loss.detach())
        if value < self._least:
            self._least = value
            for best, parameter in zip(self._best, self._parameters, strict=True):
                best.copy_(parameter.detach())
        loss.backward()
        left = 1 - self._done / self._steps
        with torch.no_grad():
            for parameter in self._rounding:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign_(), alpha=self._rate * left)
                    parameter.grad = None
        for linear in self._linears:
            linear.keep_in_range()
        if self._adam is not None:
            self._move_rest(self._adam, self._rest_rate * left)
        self._done += 1

    @torch.no_grad()
    def _move_rest(self, adam: torch.optim.Adam, rate: float) -> None:
        adam.param_groups[0]["lr"] = rate
        for master, parameter in zip(self._masters, self._rest, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        adam.step()
        for master, parameter in zip(self._masters, self._rest, strict=True):
            parameter.copy_(master)

    @torch.no_grad()
    def take_best(self) -> None:
        """Go back to what had the least loss."""
        for best, parameter in zip(self._best, self._parameters, strict=True):
            parameter.copy_(best)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [*self._rounding, *self._rest]


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded` with the gradient of `value`."""
    return rounded.detach() + (value - value.detach())  # nothing is added, so it is exact
