"""The objective of Dobi-SVD (Algorithm 1): activations are decomposed and softly truncated in every forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.loss import NotFiniteError
from ..factorization.stable_svd import stable_svd
from ..statistics.collect import token_rows
from .fixed_basis import FixedBasis, backward_loss
from .gates import gates


class ActivationTruncation:
    """The loss as a function of real ranks, with the outputs of the linears truncated instead of their weights.

    Each window's output `A` (`T x m`) of each linear, without its bias, becomes `U diag(s t(k)) V^T`. A window of `T`
    tokens has `q = min(T, m)` singular values and the matrix `p = min(m, n)`: where `q < p` the gates are centered at
    `k q / p`, so that a rank is the same share of the spectrum whatever the window's length. (The paper's code counts
    ranks in multiples of the window's length, which leaves the narrow key and value projections of GQA none.)

    Args:
        deployed: the model and its linears; matrices without a rank get their dense weights back.
    """

    def __init__(self, deployed: FixedBasis) -> None:
        self._deployed = deployed

    def loss_and_slopes(
        self, ranks: Mapping[str, float | None], betas: Mapping[str, float], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, float]]:
        """Return loss and derivatives as `FixedBasis.loss_and_slopes` does, with the outputs truncated.

        `betas` are per rank of the matrix, not per singular value of the activation.

        Raises:
            NotFiniteError: the loss or an output is NaN or infinite; names the linear.
        """
        deployed = self._deployed
        deployed.put_dense(ranks)
        real = {
            name: torch.tensor(rank, dtype=torch.float64, requires_grad=True)
            for name, rank in ranks.items()
            if rank is not None
        }
        slopes = dict.fromkeys(real, 0.0)
        tokens, total = 0, 0.0
        for row in range(len(ids)):
            window, keep = ids[row : row + 1], mask[row : row + 1]
            with self._truncating(real, betas, keep):
                loss = backward_loss(deployed.model, window, keep)
            total, tokens = total + loss.total, tokens + loss.tokens
        for name, rank in real.items():
            slopes[name] = 0.0 if rank.grad is None else float(rank.grad) / tokens
        return total / tokens, slopes

    @contextlib.contextmanager
    def _truncating(self, ranks: Mapping[str, Tensor], betas: Mapping[str, float], mask: Tensor) -> Iterator[None]:
        """A context in which the outputs of these linears are truncated."""
        deployed = self._deployed
        handles = [
            deployed.linears[name].register_forward_hook(
                _OutputTruncation(name, deployed.count(name), rank, betas[name], mask)
            )
            for name, rank in ranks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, eq=False)
class _OutputTruncation:
    """A forward hook that truncates the output of one linear; padding stays as it is.

    Attributes:
        name: of the linear, for messages.
        count: number of singular values of its matrix.
        rank: real, a scalar; gradients flow to it.
        beta: sharpness of the gates, per rank.
        mask: which tokens are no padding, `1 x seqlen`.
    """

    name: str
    count: int
    rank: Tensor
    beta: float
    mask: Tensor

    def __call__(self, module: Any, _args: tuple, output: Tensor) -> Tensor:
        bias = 0 if module.bias is None else module.bias
        flat = (output - bias).reshape(-1, output.shape[-1])
        rows = token_rows(self.name, flat, self.mask)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not bool(torch.isfinite(rows.detach()).all()):
            raise NotFiniteError(
                f"the output of {self.name} has NaN or infinite values once the layers before are truncated"
            )
        left, values, right = stable_svd(rows)
        scale = min(1.0, len(values) / self.count)
        soft = gates(self.rank * scale, len(values), self.beta / scale).to(values)
        truncated = ((left * (soft * values)) @ right.T).to(flat.dtype)
        if len(rows) < len(flat):
            keep = self.mask.reshape(-1).to(flat.device)
            truncated = flat.masked_scatter(keep[:, None], truncated)
        return truncated.reshape(output.shape) + bias
