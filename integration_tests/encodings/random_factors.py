"""Random factors, and what an encoding makes of them."""

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from optimum_dobisvd.factorization.factors import Factors
from optimum_dobisvd.structures.format import format_named

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
sizes = st.integers(1, 40)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Outputs, inputs and a rank that such a matrix may have."""
    m, n = draw(sizes), draw(sizes)
    return m, n, draw(st.integers(1, min(m, n)))


def random_factors(m: int, n: int, k: int, seed: int = 0, spread: float = 0.0) -> Factors:
    """Factors whose ranks differ by up to 10^spread in size, float64 as factorizers give them."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (spread * (torch.rand(k, generator=generator) - 0.5))
    second = torch.randn(m, k, generator=generator) * scale
    return Factors(second.double(), (torch.randn(k, n, generator=generator) * scale[:, None]).double())


def written(encoding: str, factors: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of both linears in the gauge of the encoding."""
    format = format_named("low_rank", encoding)
    return format.structure.written(factors, format.encoding.gauge, dtype)


def quantized(
    encoding: str, weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """The linears that these weights become, and the matrices they stand for."""
    full_rank = min(len(weights["second"]), weights["first"].shape[1])
    return format_named("low_rank", encoding).quantize(weights, None, dtype, full_rank)


def product(matrices: dict[str, Tensor]) -> Tensor:
    """In float64."""
    return matrices["second"].double() @ matrices["first"].double()


def tensor_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
