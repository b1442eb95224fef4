"""The loss as a function of real ranks, in the basis that is deployed.

With a matrix written as `W = L R` (best rank-one terms first, as its factorizer gives them), `W(k) = L diag(t(k)) R`
is exactly the weight that truncation at `k` deploys. So no singular value decomposition has to be differentiated: the
weights are rebuilt, the model takes one ordinary forward and backward pass, and `dLoss/dt_i = l_i^T (dLoss/dW) r_i^T`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation.plan import PlannedModule
from ..calibration.loss import NextTokenLoss
from ..calibration.temporarily import evaluating, frozen, without_cache
from ..factorization.factors import Decomposition
from ..model.linears import as_matrix, weight_matrix

REACH = 4.0
"""How far gates are soft, in units of `1 / beta` ranks from `k`: beyond, they are 0 or 1 to within 0.04 %."""


class FixedBasis:
    """A context in which the weights of a model are truncated in place; leaving it restores the dense weights.

    The model is a dense causal language model with its weights in memory; `bases` are the decompositions of the
    linears whose ranks are learned, kept as balanced factors in the weights' dtype.
    """

    def __init__(
        self, model: Any, linears: Mapping[str, nn.Module], bases: Iterable[tuple[str, Decomposition]]
    ) -> None:
        self.model = model
        self.linears: dict[str, Any] = dict(linears)
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}
        for name, found in bases:
            weight = weight_matrix(self.linears[name])
            factors = found.truncate(min(weight.shape)).balanced()
            self._bases[name] = (factors.second.to(weight), factors.first.to(weight))
        # On the CPU: they are needed for dense matrices, and at the end.
        self._dense = {name: weight_matrix(module).to("cpu", copy=True) for name, module in self.linears.items()}
        self._open = contextlib.ExitStack()

    def count(self, name: str) -> int:
        """Return the number of singular values of a matrix, `min(m, n)`."""
        return len(self._bases[name][1])

    def __enter__(self) -> FixedBasis:
        for context in (evaluating(self.model), without_cache(self.model), frozen(self.model)):
            self._open.enter_context(context)
        self._open.callback(self.put_dense, self.linears)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @torch.no_grad()
    def put_dense(self, names: Iterable[str]) -> None:
        """Restore the dense weights of these matrices."""
        for name in names:
            weight_matrix(self.linears[name]).copy_(self._dense[name])

    @torch.no_grad()
    def put(self, planned: Mapping[str, PlannedModule]) -> None:
        """Give every matrix the weight that a plan deploys, before it is quantized."""
        for name in self.linears:
            module = planned[name]
            if module.rank is None:
                self.put_dense([name])
                continue
            left, right = self._bases[name]
            chosen = torch.tensor(module.kept, device=left.device)
            weight_matrix(self.linears[name]).copy_(left[:, chosen] @ right[chosen])

    def loss_and_gains(
        self, planned: Mapping[str, PlannedModule], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, Tensor]]:
        """Return the loss at a plan's weights, and by how much opening the gate of each direction decreases it.

        The loss is the mean in nats per token over a batch (tokens and token mask, `batch x seqlen`). The decreases
        are `-dLoss/dt_i` for every linear, dense ones included: `min(m, n)` numbers (float64, CPU). ValueError if no
        token has a label, or the loss is NaN or infinite.
        """
        self.put(planned)
        sums = {name: torch.zeros(self.count(name), dtype=torch.float64) for name in self.linears}

        def read(name: str, gradient: Tensor) -> None:
            left, right = self._bases[name]
            sums[name] -= ((left.T @ gradient) * right).sum(1).double().cpu()

        with self._reading_gradients(self.linears, read):
            loss = backward_loss(self.model, ids, mask)
        return loss.total / loss.tokens, {name: found / loss.tokens for name, found in sums.items()}

    def loss_and_slopes(
        self, ranks: Mapping[str, float | None], betas: Mapping[str, float], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, float]]:
        """Return the mean loss in nats per token at softly truncated weights, and its derivative by every real rank.

        A rank of None is the dense weight, which has no derivative; `betas` are the sharpness of the gates, per rank.
        Batch and errors are those of `loss_and_gains`.
        """
        self.put_dense([name for name, rank in ranks.items() if rank is None])
        real = {name: rank for name, rank in ranks.items() if rank is not None}
        for name, rank in real.items():
            self._put_soft(name, rank, betas[name])
        sums = dict.fromkeys(real, 0.0)

        def read(name: str, gradient: Tensor) -> None:
            sums[name] += self._slope(name, real[name], betas[name], gradient)

        with self._reading_gradients(real, read):
            loss = backward_loss(self.model, ids, mask)
        return loss.total / loss.tokens, {name: slope / loss.tokens for name, slope in sums.items()}

    def loss(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Return the mean loss in nats per token at the present weights. ValueError if no token has a label."""
        loss = NextTokenLoss()
        with torch.no_grad():
            for ids, mask in batches:
                loss.of(self.model, ids, mask)
        loss.check_seen()
        return loss.total / loss.tokens

    @torch.no_grad()
    def _put_soft(self, name: str, rank: float, beta: float) -> None:
        left, right = self._bases[name]
        first, last = reach(rank, len(right), beta)
        soft = gates(torch.tensor(rank, dtype=torch.float64), len(right), beta)[:last].to(left)
        soft[:first] = 1  # their slope is not read, and an error of 0.04 % of the leading terms would matter
        weight_matrix(self.linears[name]).copy_((left[:, :last] * soft) @ right[:last])

    @contextlib.contextmanager
    def _reading_gradients(self, names: Iterable[str], read: Callable[[str, Tensor], None]) -> Iterator[None]:
        """A context in which each weight's gradient (`m x n`) is passed to `read` once it is complete, and freed."""
        users = {name: self.linears[name].weight.grad for name in names}
        with contextlib.ExitStack() as hooks:
            for name in users:
                parameter = self.linears[name].weight
                parameter.grad = None
                parameter.requires_grad_(True)
                hook = partial(self._hand_over, name, read)
                hooks.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
            try:
                yield
            finally:
                for name, gradient in users.items():
                    self.linears[name].weight.requires_grad_(False)
                    self.linears[name].weight.grad = gradient

    @torch.no_grad()
    def _hand_over(self, name: str, read: Callable[[str, Tensor], None], parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            read(name, as_matrix(self.linears[name], gradient))

    def _slope(self, name: str, rank: float, beta: float, gradient: Tensor) -> float:
        left, right = self._bases[name]
        first, last = reach(rank, len(right), beta)
        by_gate = ((left[:, first:last].T @ gradient) * right[first:last]).sum(1)
        slope = slopes(torch.tensor(rank, dtype=torch.float64), len(right), beta)[first:last]
        return float(by_gate.double().cpu() @ slope)


def backward_loss(model: Any, ids: Tensor, mask: Tensor) -> NextTokenLoss:
    """Run forward and backward passes over a batch (`batch x seqlen`), window by window; returns the summed loss.

    ValueError if no token has a label, or the loss is NaN or infinite.
    """
    loss = NextTokenLoss()
    with torch.enable_grad():
        for window, keep in zip(ids.split(1), mask.split(1), strict=True):
            found = loss.of(model, window, keep)
            if found.requires_grad:
                found.backward()
    loss.check_seen()
    return loss


def gates(rank: Tensor, count: int, beta: float | Tensor) -> Tensor:
    """Return the gates `t_i = tanh(beta (k - i + 1/2)) / 2 + 1/2`, `i = 1 .. count` (Dobi-SVD, Algorithm 1).

    They sum to `k` where `k` is far from both ends.

    Args:
        rank: `k`, a real number as a tensor; gradients flow to it.
        count: number of singular values.
        beta: sharpness, per rank. At a large one the gates are a step, whose slope vanishes at integers.
    """
    places = torch.arange(1, count + 1, dtype=rank.dtype, device=rank.device)
    return (beta * (rank - places + 0.5)).tanh() / 2 + 0.5


def slopes(rank: Tensor, count: int, beta: float | Tensor) -> Tensor:
    """Return `dt_i / dk`, `i = 1 .. count`; they sum to 1 where `k` is far from both ends. Arguments as of `gates`."""
    places = torch.arange(1, count + 1, dtype=rank.dtype, device=rank.device)
    return beta / 2 / (beta * (rank - places + 0.5)).cosh().square()


def reach(rank: float, count: int, beta: float) -> tuple[int, int]:
    """Return `(first, last)`: gates before place `first` are open (1), those from `last` on are shut (0)."""
    width = REACH / beta
    first = min(max(int(rank - width), 0), count - 1)
    return first, max(min(int(rank + width) + 1, count), first + 1)
