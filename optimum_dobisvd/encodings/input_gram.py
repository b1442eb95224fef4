"""The Gram of a linear's inputs, and what an error of its weight comes to under it, with error feedback or without.

Bundled with every checkpoint (see `checkpoint.bundle`), as `base` is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputErrors:
    """What an error `E` (`m x n`) of a linear's weight does to each output: `E_i H E_i^T`.

    Attributes:
        total: of every output, `m`.
        within: of it what lies in the span of given rows, as their inputs see it, `m`.
    """

    total: Tensor
    within: Tensor


@dataclass(frozen=True)
class Feedback:
    """How error feedback goes through a linear's inputs.

    Attributes:
        damping: added to the diagonal of their Gram, as a share of its mean.
        largest_first: whether inputs with the largest second moment are rounded first, or all as they come.
    """

    damping: float
    largest_first: bool = True


class InputGram:
    """`H = X X^T` (`n x n`) of a linear's inputs, and what an error of its weight comes to under it.

    Sums of squares are taken in float32, which is twice as fast; what is solved for is solved in float64.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.single = matrix.float()
        self._roots: dict[Feedback, tuple[Tensor, Tensor]] = {}
        # Encodings are asked about the same rows in turn.
        self._of_rows: tuple[Tensor, Tensor] | None = None
        self._seen: tuple[Tensor, Feedback, Tensor] | None = None

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return `P H P^T` (`k x k`, float64) of rows `P` (`k x n`)."""
        if self._of_rows is None or self._of_rows[0] is not rows:
            self._of_rows = rows, rows.double() @ self.matrix.double() @ rows.double().T
        return self._of_rows[1]

    def errors(self, error: Tensor, rows: Tensor | None = None) -> OutputErrors:
        """Return what an uncorrected error (`m x n`) comes to; `rows` (`k x n`) are those of `within`."""
        seen = error.float() @ self.single
        total = (seen * error).sum(1).double()
        if rows is None:
            return OutputErrors(total, torch.zeros_like(total))
        moments = self.of_rows(rows).clone()
        moments.diagonal().add_(1e-9 * moments.diagonal().mean().clamp_min(1e-300))
        crossed = (seen @ rows.T.float()).double()
        return OutputErrors(total, (torch.linalg.solve(moments, crossed.T).T * crossed).sum(1))

    def errors_with_feedback(self, error: Tensor, feedback: Feedback, rows: Tensor | None = None) -> OutputErrors:
        """Return what is left of an error when the inputs after each one make up for it; see `errors`."""
        variances, squares = self.conditional_variances(feedback), error.square().double()
        total = squares @ variances
        if rows is None:
            return OutputErrors(total, torch.zeros_like(total))
        return OutputErrors(total, squares @ (variances * self._shares(rows, feedback)))

    def conditional_variances(self, feedback: Feedback) -> Tensor:
        """Return the variance of each input given the inputs that are rounded after it, damping added to all.

        Error feedback rounds inputs in order and makes up for each error with the inputs that are left, so that of an
        error only this part remains.
        """
        order, root = self._root(feedback)
        return root.diagonal().square()[order.argsort()]

    def _shares(self, rows: Tensor, feedback: Feedback) -> Tensor:
        """Which share of these conditional parts of the inputs the rows see, `n` numbers."""
        if self._seen is None or self._seen[0] is not rows or self._seen[1] != feedback:
            order, root = self._root(feedback)
            basis = torch.linalg.qr((rows.float()[:, order] @ root.float()).T)[0]
            self._seen = rows, feedback, basis.square().sum(1)[order.argsort()].double()
        return self._seen[2]

    def _root(self, feedback: Feedback) -> tuple[Tensor, Tensor]:
        """The inputs, last rounded first, and the lower root of their damped Gram in that order."""
        if feedback not in self._roots:
            damped = self.matrix.double().clone()
            diagonal = damped.diagonal()
            order = diagonal.argsort(stable=True) if feedback.largest_first else torch.arange(len(damped)).flip(0)
            order = order.to(damped.device)
            diagonal.add_(feedback.damping * diagonal.mean().clamp_min(1e-300))
            self._roots[feedback] = order, torch.linalg.cholesky(damped[order][:, order])
        return self._roots[feedback]
