"""Random weights and calibration inputs, well and badly behaved, that the factorization tests share."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = (
    "full",
    "rank_deficient",
    "few_tokens",
    "dead_channels",
    "dead_and_few",
    "badly_scaled",
    "scaled_and_deficient",
)


@dataclass(frozen=True)
class Case:
    """A weight `m x n` and its inputs `n x T` (tokens as columns), float64."""

    kind: str
    weight: Tensor
    inputs: Tensor

    @property
    def gram(self) -> Tensor:
        return self.inputs @ self.inputs.T

    @property
    def abs_mean(self) -> Tensor:
        return self.inputs.abs().mean(1)

    @property
    def ranks(self) -> range:
        return range(1, min(self.weight.shape) + 1)

    def dense_output(self) -> float:
        """`||WX||_F`."""
        return float(torch.linalg.norm(self.weight @ self.inputs))

    def loss(self, product: Tensor) -> float:
        """`||(W - W')X||_F`, from X itself."""
        return float(torch.linalg.norm((self.weight - product) @ self.inputs))

    def best_losses(self) -> Tensor:
        """The smallest loss at ranks 0, 1, 2, ...: Eckart-Young on the stacked outputs `WX`, no Gram involved."""
        values = torch.linalg.svdvals(self.weight @ self.inputs)
        squares = torch.cat([values.square(), values.new_zeros(1)])
        return squares.flip(0).cumsum(0).flip(0).sqrt()


def make_case(kind: str, m: int, n: int, tokens: int, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(m, n)
    inputs = normal(n, tokens)
    if "deficient" in kind:
        rank = max(1, n // 3)
        inputs = normal(n, rank) @ normal(rank, tokens)
    if "few" in kind:
        inputs = inputs[:, : max(1, n // 2)]
    if "dead" in kind:
        dead = torch.rand(n, generator=generator) < 0.3
        dead[0] = False
        inputs[dead] = 0
    if "scaled" in kind:
        # Channels over eight decades, and a weight that makes up for it where a norm's gain was folded into it.
        scale = 10 ** (8 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 4)
        inputs = inputs * scale
        if seed % 2:
            weight = weight / scale.T
    return Case(kind, weight, inputs)


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, largest: int = 20) -> Case:
    size = st.integers(1, largest)
    tokens = draw(st.integers(1, 2 * largest))
    return make_case(draw(st.sampled_from(kinds)), draw(size), draw(size), tokens, draw(st.integers(0, 2**20)))


@st.composite
def well_conditioned_cases(draw: st.DrawFn) -> Case:
    """Gram positive definite: many more tokens than features; its channels may still be badly scaled."""
    n = draw(st.integers(1, 16))
    kind = draw(st.sampled_from(("full", "badly_scaled")))
    return make_case(kind, draw(st.integers(1, 20)), n, 4 * n + 8, draw(st.integers(0, 2**20)))
