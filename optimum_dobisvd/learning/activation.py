"""The objective of Dobi-SVD (Algorithm 1): activations are decomposed and softly truncated in every forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..calibration.loss import NotFiniteError
from ..calibration.tokens import text_rows
from ..factorization.stable_svd import stable_svd
from .fixed_basis import FixedBasis, backward_loss, gates


class ActivationTruncation:
    """The loss as a function of real ranks, with the outputs of the linears truncated instead of their weights.

    Each window's output `A` (`T x m`) of each linear, without its bias, becomes `U diag(s t(k)) V^T`. A window of `T`
    tokens has `q = min(T, m)` singular values and the matrix `p = min(m, n)`: where `q < p` the gates are centered at
    `k q / p`, so that a rank is the same share of the spectrum whatever the window's length. (The paper's code counts
    ranks in multiples of the window's length, which leaves the narrow key and value projections of GQA none.)
    Matrices without a rank get their dense weights back.
    """

    def __init__(self, deployed: FixedBasis) -> None:
        self._deployed = deployed

    def loss_and_slopes(
        self, ranks: Mapping[str, float | None], betas: Mapping[str, float], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, float]]:
        """Return loss and derivatives as `FixedBasis.loss_and_slopes` does, with the outputs truncated.

        `betas` are per rank of the matrix, not per singular value of the activation. NotFiniteError if the loss or an
        output is NaN or infinite; it names the linear.
        """
        deployed = self._deployed
        deployed.put_dense(ranks)
        real = {
            name: torch.tensor(rank, dtype=torch.float64, requires_grad=True)
            for name, rank in ranks.items()
            if rank is not None
        }
        tokens, total = 0, 0.0
        for window, keep in zip(ids.split(1), mask.split(1), strict=True):
            with contextlib.ExitStack() as hooks:
                for name, rank in real.items():
                    hook = _truncation(name, deployed.count(name), rank, betas[name], keep)
                    hooks.callback(deployed.linears[name].register_forward_hook(hook).remove)
                loss = backward_loss(deployed.model, window, keep)
            total, tokens = total + loss.total, tokens + loss.tokens
        slopes = {name: 0.0 if rank.grad is None else float(rank.grad) / tokens for name, rank in real.items()}
        return total / tokens, slopes


def _truncation(name: str, count: int, rank: Tensor, beta: float, mask: Tensor) -> Callable[..., Tensor]:
    """Return a forward hook that truncates the output of the linear `name`; padding stays as it is.

    `count` is the number of singular values of its matrix; gradients flow to the real `rank`.
    """

    def truncate(module: Any, _args: tuple, output: Tensor) -> Tensor:
        bias = 0 if module.bias is None else module.bias
        flat = (output - bias).reshape(-1, output.shape[-1])
        chosen = text_rows(name, output.shape[:-1], mask)
        chosen = None if chosen is None else chosen.to(flat.device)
        rows = flat if chosen is None else flat[chosen]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not bool(torch.isfinite(rows.detach()).all()):
            raise NotFiniteError(
                f"the output of {name} has NaN or infinite values once the layers before are truncated"
            )
        left, values, right = stable_svd(rows)
        scale = min(1.0, len(values) / count)
        soft = gates(rank * scale, len(values), beta / scale).to(values)
        truncated = ((left * (soft * values)) @ right.T).to(flat.dtype)
        if chosen is not None:
            truncated = flat.index_copy(0, chosen, truncated)
        return truncated.reshape(output.shape) + bias

    return truncate
