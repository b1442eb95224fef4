"""What rounding costs the loss, for one matrix in every format."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_dobisvd.allocation.quantization_loss import quantization_losses
from optimum_dobisvd.encodings.input_gram import InputGram
from optimum_dobisvd.factorization.factors import Decomposition
from optimum_dobisvd.factorization.kfac import kfac, output_root
from optimum_dobisvd.structures.format import Format, format_named

ENCODINGS = ("int8", "remap", "gptq4_g32", "gptq2_g32", "nf4", "llm_int8")


def matrix(m: int, n: int, seed: int = 0) -> tuple[Tensor, Decomposition, Tensor, Tensor]:
    """A weight, its decomposition in the metric of the loss, the Gram of its inputs, and a root of the outputs'."""
    generator = torch.Generator().manual_seed(seed)

    def gram(size: int) -> Tensor:
        samples = torch.randn(3 * size, size, dtype=torch.float64, generator=generator)
        samples = samples @ torch.randn(size, size, dtype=torch.float64, generator=generator)
        return samples.T @ samples / len(samples)

    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    inputs, root = gram(n), output_root(gram(m))
    return weight, kfac(weight, (inputs, root)), inputs, root.root


def formats(structure: str) -> list[Format]:
    return [format_named(structure, encoding) for encoding in ENCODINGS]


def test_formats_with_a_rank_have_a_loss_at_every_rank_and_the_others_one_number() -> None:
    weight, found, gram, root = matrix(96, 160)
    losses = quantization_losses([*formats("low_rank"), *formats("dense")], weight, found, gram, root)
    assert losses.keys() == {(structure, encoding) for structure in ("low_rank", "dense") for encoding in ENCODINGS}
    inputs = InputGram(gram)
    for (structure, encoding), loss in losses.items():
        format = format_named(structure, encoding)
        assert loss.dtype == torch.float64
        if structure == "dense":
            assert loss.shape == ()
            assert float(loss) == pytest.approx(format.quantization_loss(weight, inputs, root), rel=1e-3)
            continue
        assert loss.shape == (97,)
        assert float(loss[0]) == 0
        for rank in (32, 64):  # where it is measured, up to the first rank at which two factors are larger
            exact = format.quantization_loss(found.truncate(rank), inputs, root)
            assert float(loss[rank]) == pytest.approx(exact, rel=1e-3)
        # In between it is interpolated.
        torch.testing.assert_close(loss[32:65].diff(), ((loss[64] - loss[32]) / 32).expand(32))


def test_ranks_past_break_even_are_measured_where_the_matrix_cannot_be_stored_whole_in_that_encoding() -> None:
    weight, found, gram, root = matrix(96, 160)
    for format in formats("low_rank"):
        loss = quantization_losses([format], weight, found, gram, root)[format.key]
        exact = format.quantization_loss(found.truncate(96), InputGram(gram), root)
        assert float(loss[96]) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("structure", ["low_rank", "pivoted"])
@pytest.mark.parametrize("encoding", ["int8", "gptq4_g32", "nf4"])
def test_the_loss_between_the_measured_ranks_is_near_what_a_measurement_there_gives(
    structure: str, encoding: str
) -> None:
    weight, found, gram, root = matrix(192, 256)
    format = format_named(structure, encoding)
    loss = quantization_losses([format], weight, found, gram, root)[format.key]
    for rank in (48, 96, 160):
        measured = format.quantization_loss(found.truncate(rank), InputGram(gram), root)
        assert float(loss[rank]) == pytest.approx(measured, rel=0.25)


def test_finer_encodings_lose_less_in_either_structure() -> None:
    weight, found, gram, root = matrix(128, 128)
    losses = quantization_losses([*formats("low_rank"), *formats("dense")], weight, found, gram, root)
    for structure in ("low_rank", "dense"):
        at_full_rank = [float(losses[structure, name].flatten()[-1]) for name in ("gptq2_g32", "nf4", "int8")]
        assert at_full_rank == sorted(at_full_rank, reverse=True)
        assert at_full_rank[-1] > 0


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (40, 33)])
def test_small_matrices_are_measured_at_their_full_rank(shape: tuple[int, int]) -> None:
    weight, found, gram, root = matrix(*shape)
    format = format_named("low_rank", "int8")
    loss = quantization_losses([format], weight, found, gram, root)["low_rank", "int8"]
    full = min(shape)
    assert loss.shape == (full + 1,)
    exact = format.quantization_loss(found.truncate(full), InputGram(gram), root)
    assert float(loss[full]) == pytest.approx(exact, rel=1e-2)


def test_without_ranks_no_decomposition_is_needed() -> None:
    weight, _, gram, root = matrix(32, 64)
    losses = quantization_losses([*formats("low_rank"), *formats("dense")], weight, None, gram, root)
    assert losses.keys() == {("dense", encoding) for encoding in ENCODINGS}


@pytest.mark.parametrize("structure", ["low_rank", "pivoted"])
@given(seed=st.integers(0, 99), rank=st.integers(1, 23))
def test_the_loss_of_8_bits_is_near_what_their_rounding_adds_to_the_error(
    structure: str, seed: int, rank: int
) -> None:
    """The loss of factors is estimated from that of either; the error of both together is that and little else."""
    _, found, gram, root = matrix(24, 40, seed)
    format, factors = format_named(structure, "int8"), found.truncate(rank)
    weights = format.structure.written(factors, format.encoding.gauge, torch.float32)
    _, matrices = format.quantize(weights, None, torch.float32, 24, gram)
    error = format.structure.product({name: each.double() for name, each in matrices.items()}) - factors.product()
    exact = float(torch.einsum("ij,jk,ik->", root.T @ error, gram, root.T @ error))
    estimated = format.quantization_loss(factors, InputGram(gram), root)
    assert 0.6 * exact < estimated < 1.6 * exact  # with a median of 1.00 over seeds and ranks
