"""How a matrix is written as linears, and what their inputs and errors are."""

import pytest
import torch
from torch import Tensor

from optimum_dobisvd.encodings.input_gram import InputGram, OutputErrors
from optimum_dobisvd.factorization.factors import Factors, Gauge
from optimum_dobisvd.structures.base import RoundingErrors
from optimum_dobisvd.structures.dense import DenseLinear
from optimum_dobisvd.structures.low_rank import LowRankLinear
from optimum_dobisvd.structures.registry import STRUCTURES

M, N, RANK = 6, 9, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written(structure: type, gauge: Gauge = Gauge.BALANCED) -> tuple[Tensor, dict[str, Tensor]]:
    """A matrix, and the weights of its linears."""
    factors = Factors(normal(M, RANK, seed=1), normal(RANK, N, seed=2))
    source = factors if structure.has_rank else factors.product()
    return factors.product(), structure.written(source, gauge, torch.float32)


structures = pytest.mark.parametrize("structure", [STRUCTURES.get(name) for name in STRUCTURES], ids=list(STRUCTURES))


@structures
@pytest.mark.parametrize("gauge", list(Gauge))
def test_the_linears_weights_stand_for_the_matrix_in_every_gauge(structure: type, gauge: Gauge) -> None:
    matrix, weights = written(structure, gauge)
    own = structure.own_tensors(M, N, RANK)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    assert shapes == structure.linears(M, N, RANK) | {name: tuple(shape) for name, (shape, _) in own.items()}
    torch.testing.assert_close(structure.product(weights), matrix)


@structures
def test_the_gram_of_a_linears_inputs_is_that_of_what_the_linears_before_it_give(structure: type) -> None:
    x = normal(30, N, seed=3)
    _, weights = written(structure)
    gram, before = x.T @ x, {}
    for name in structure.linears(M, N, RANK):
        torch.testing.assert_close(structure.input_gram(name, gram, before), x.T @ x)
        x = x @ weights[name].T
        before[name] = weights[name]


@structures
@pytest.mark.parametrize("place", [0, 1])
def test_an_error_in_one_output_of_a_linear_costs_what_the_loss_feels_of_the_matrix(
    structure: type, place: int
) -> None:
    """After what the structure refits to it."""
    matrix, weights = written(structure)
    x, root = normal(30, N, seed=3), normal(M, M, seed=4)
    gram, names = x.T @ x, list(structure.linears(M, N, RANK))
    changed = names[min(place, len(names) - 1)]
    for output in range(len(weights[changed])):
        error = torch.zeros_like(weights[changed])
        error[output] = 1e-3 * normal(weights[changed].shape[1], seed=5)
        found = structure.quantization_loss(weights, InputGram(gram), root)(errors_of(error))
        rounded = dict(weights)
        for name in names:
            rounded[name] = structure.refitted(name, weights, rounded, gram) + (error if name == changed else 0)
        total = structure.product(rounded) - matrix
        assert found == pytest.approx(float((root.T @ total @ x.T).square().sum()), rel=0.02)


def errors_of(error: Tensor) -> RoundingErrors:
    """Make that error in the linear of its shape, and none in others."""

    def rounding_errors(weight: Tensor, inputs: InputGram, rows: Tensor | None) -> OutputErrors:
        return inputs.errors(error if weight.shape == error.shape else torch.zeros_like(weight), rows)

    return rounding_errors


def test_a_low_rank_needs_a_rank_and_factors() -> None:
    with pytest.raises(ValueError, match="structure 'low_rank' needs a rank"):
        LowRankLinear.linears(M, N, None)
    with pytest.raises(TypeError, match="structure 'low_rank' is written from factors"):
        LowRankLinear.written(normal(M, N), Gauge.BALANCED, torch.float32)


def test_a_low_rank_has_its_factors_back() -> None:
    module = LowRankLinear(N, M, RANK, dtype=torch.float32)
    second, first = module.factors()
    assert torch.equal(second, module.second.weight.double())
    assert torch.equal(first, module.first.weight.double())
    torch.testing.assert_close(module.dense_matrix(), (second @ first).float())
    assert module.bias is module.second.bias
    assert module.first.bias is None


def test_a_dense_matrix_has_no_factors_but_takes_them() -> None:
    with pytest.raises(TypeError, match="structure 'dense' has no factors"):
        DenseLinear(N, M, None).factors()
    factors = Factors(normal(M, RANK), normal(RANK, N))
    assert torch.equal(DenseLinear.written(factors, Gauge.BALANCED, torch.float32)["linear"], factors.product())
