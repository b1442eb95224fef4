"""Rows of the matrix itself, and the other rows in terms of them: `W'[rest] = C W'[pivots]`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..encodings.input_gram import InputGram
from ..factorization.factors import Factors, Gauge
from ..factorization.pivots import interpolate
from .base import CompressedLinear, QuantizationLoss, RoundingErrors

PERMUTATION = "permutation"
_IN_A_BYTE = 256
_REFIT_DAMPING = 1e-4
"""Added to the diagonal of the Gram of the pivot rows' outputs, as a share of its mean."""


class PivotedLinear(CompressedLinear):
    """`u = first(x)`, `v = second(u)`, and `y` has `u` and `v` at the places that `permutation` names.

    `first` (`k x n`) are `k` rows of the matrix, `second` (`m - k x k`) the other rows in terms of them (PIFA, arXiv
    2501.19090). That spends no numbers on the `k x k` gauge that two factors leave open, so it is smaller than the
    matrix at every rank below `min(m, n)`.

    `permutation[j]` is the output that row `j` of the two stacked linears gives. The bias is its own, of `m` values:
    in `first` it would reach all outputs.
    """

    structure = "pivoted"
    gauge_is_free = False
    outputs_in_order = False
    bias_key = "bias"
    rank: int
    first: nn.Module
    second: nn.Module
    permutation: Tensor

    @classmethod
    def linears(cls, out_features: int, in_features: int, rank: int | None) -> dict[str, tuple[int, int]]:
        if rank is None:
            raise ValueError("structure 'pivoted' needs a rank")
        return {"first": (rank, in_features), "second": (out_features - rank, rank)}

    @classmethod
    def own_tensors(
        cls, out_features: int, in_features: int, rank: int | None
    ) -> dict[str, tuple[list[int], torch.dtype]]:
        # Not int16: DistributedDataParallel broadcasts buffers, and neither gloo nor NCCL knows that type.
        return {PERMUTATION: ([out_features], torch.uint8 if out_features <= _IN_A_BYTE else torch.int32)}

    @classmethod
    def problem_with(cls, name: str, tensor: Tensor) -> str | None:
        if bool((tensor.long().sort().values == torch.arange(len(tensor))).all()):
            return None
        return f"is no permutation of the numbers from 0 to {len(tensor) - 1}"

    @classmethod
    def written(cls, source: Factors | Tensor, gauge: Gauge, dtype: torch.dtype) -> dict[str, Tensor]:
        if isinstance(source, Tensor):
            raise TypeError("structure 'pivoted' is written from factors")
        factors = source.balanced()
        rank = len(factors.first)
        order, coefficients = interpolate(factors.second)
        pivots = factors.second[order[:rank]].double() @ factors.first.double()
        tensors = cls.own_tensors(len(factors.second), factors.first.shape[1], rank)
        return {"first": pivots, "second": coefficients, PERMUTATION: order.to(tensors[PERMUTATION][1])}

    @classmethod
    def refitted(
        cls, linear: str, weights: Mapping[str, Tensor], before: Mapping[str, Tensor], gram: Tensor | None
    ) -> Tensor:
        """Fit the other rows to the rounded pivot rows `P'`: `C + C (P - P') H P'^T S^-1` with `S = P' H P'^T`."""
        weight = weights[linear]
        if linear == "first" or gram is None or not len(weight):
            return weight
        rounded, exact, felt = before["first"].double(), weights["first"].double(), gram.double()
        inputs = rounded @ felt @ rounded.T
        inputs.diagonal().add_(_REFIT_DAMPING * inputs.diagonal().mean().clamp_min(1e-300))
        moved = torch.linalg.solve(inputs, rounded @ felt @ (exact - rounded).T).T
        return weight + weight.double() @ moved

    @classmethod
    def quantization_loss(cls, weights: Mapping[str, Tensor], gram: InputGram, root: Tensor) -> QuantizationLoss:
        """See `CompressedLinear`: the loss after the refit, which attenuates `C` to `C S (S + N)^-1`.

        `N` are the errors of the pivot rows. That is least squares on regressors with noise: an error that the pivot
        rows can express themselves is undone in the other rows, and one that is larger than what a pivot row says
        makes them rely on it less.
        """
        pivots, other = weights["first"], weights["second"]
        at_pivots, at_rest = (root[rows] for rows in weights[PERMUTATION].long().tensor_split([len(pivots)]))
        moments, felt = gram.of_rows(pivots), at_rest.T @ other
        felt_in_rest = 2 * at_pivots @ felt + felt.T @ felt
        felt_of_pivots, felt_of_rest = (rows.square().sum(1).double() for rows in (at_pivots, at_rest))
        damping = _REFIT_DAMPING * moments.diagonal().mean().clamp_min(1e-300)

        def loss(rounding_errors: RoundingErrors) -> float:
            found = rounding_errors(pivots, gram, pivots)
            noise = (found.total - found.within).clamp_min(0)
            kept = torch.linalg.solve(moments + torch.diag(noise + damping), moments).T.to(other)
            in_rest = (felt_in_rest * kept.T).sum(1).double() @ noise
            inner = InputGram(moments + torch.diag(found.total))
            in_second = felt_of_rest @ rounding_errors(other @ kept, inner, None).total
            return float(felt_of_pivots @ found.total + in_rest + in_second)

        return loss

    @classmethod
    def product(cls, matrices: Mapping[str, Tensor]) -> Tensor:
        return cls._outer(matrices) @ matrices["first"]

    @classmethod
    def _outer(cls, matrices: Mapping[str, Tensor]) -> Tensor:
        """Return the factor that takes the pivot rows to all rows, `m x k`."""
        second = matrices["second"]
        stacked = torch.cat([torch.eye(second.shape[1]).to(second), second])
        outer = torch.empty_like(stacked)
        outer[matrices[PERMUTATION].long()] = stacked
        return outer

    def parts(self, x: Tensor) -> list[Tensor]:
        pivots = self.first(x)
        return [pivots, self.second(pivots)]

    def forward(self, x: Tensor) -> Tensor:
        pivots = self.first(x)
        store = getattr(self.second, "placed", None)
        stored: Tensor | None = None if store is None else store(pivots, self.permutation, self.bias)
        if stored is not None:
            return stored
        rest = self.second(pivots)
        if self.sources is not None:
            # A third to a half of the time of storing to places, and compilers fuse it into what comes next.
            stacked = torch.cat([pivots, rest], dim=-1)
            return self._with_bias(_gathered(stacked, self.sources.expand(stacked.shape)))
        places = self.permutation.long()
        y = pivots.new_empty(*pivots.shape[:-1], self.out_features)
        y.index_copy_(-1, places[: self.rank], pivots)
        y.index_copy_(-1, places[self.rank :], rest.to(y.dtype))
        return self._with_bias(y)

    def _with_bias(self, y: Tensor) -> Tensor:
        # As nn.Linear does under autocast: a bias in float32 would make the output float32.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def output_places(self, linear: str) -> Tensor | None:
        return self.permutation if linear == "second" else None

    def set_inference(self, on: bool) -> None:
        self.sources = self.permutation.long().argsort() if on else None

    def factors(self) -> tuple[Tensor, Tensor]:
        matrices = self.matrices()
        return self._outer(matrices).double(), matrices["first"].double()


def _gathered(x: Tensor, sources: Tensor) -> Tensor:
    """`x.gather(-1, sources)`; 16 bits as whole numbers, which a CPU gathers twice as fast."""
    if x.device.type != "cpu" or x.element_size() != 2 or x.requires_grad or torch.compiler.is_compiling():
        return x.gather(-1, sources)
    return x.view(torch.int16).gather(-1, sources).view(x.dtype)
