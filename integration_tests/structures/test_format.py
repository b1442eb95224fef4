"""Every structure with every encoding: bytes, multiply-adds, tensors and modules follow from the linears."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from integration_tests.allocation.budget_cases import SIZES
from optimum_dobisvd.factorization.factors import Factors
from optimum_dobisvd.model.footprint import macs_per_token
from optimum_dobisvd.structures.base import to_dense
from optimum_dobisvd.structures.format import AS_IS, Format, format_named
from optimum_dobisvd.structures.registry import STRUCTURES

OURS = ("float", "int8", "remap")
GPTQ = ("gptq2_g32", "gptq3_g32", "gptq4_g32", "gptq8_g32")
BITSANDBYTES = ("nf4", "nf4_dq", "fp4", "fp4_dq", "llm_int8")
DTYPE_BYTES = {"I8": 1, "U8": 1, "I32": 4, "F32": 4}


def formats(*encodings: str) -> pytest.MarkDecorator:
    """Every structure there is with each of these encodings that goes with it."""
    every = [format_named(structure, encoding) for structure, encoding in product(STRUCTURES, encodings)]
    pairs = [format for format in every if format.conflict is None]
    return pytest.mark.parametrize("format", pairs, ids=["-".join(format.key) for format in pairs])


def rank_of(format: Format, rank: int) -> int | None:
    return rank if format.structure.has_rank else None


def listed_bytes(tensors: dict[str, tuple[list[int], str | None]], element_size: int) -> int:
    return sum(
        torch.Size(shape).numel() * (element_size if dtype is None else DTYPE_BYTES[dtype])
        for shape, dtype in tensors.values()
    )


@formats(*OURS, *GPTQ, *BITSANDBYTES)
def test_a_format_is_found_by_its_names(format: Format) -> None:
    again = format_named(*format.key)
    assert (again.structure, again.encoding.name) == (format.structure, format.encoding.name)
    assert format.leaves_as_is == (format.key == ("dense", "float")) == (format.key == AS_IS.key)


@pytest.mark.parametrize(
    ("structure", "encoding", "message"),
    [
        ("lowrank", "float", "unknown structure 'lowrank'; known: low_rank, dense, pivoted"),
        (None, "float", "unknown structure None; known: dense, low_rank, pivoted"),
        ("low_rank", "plain", "unknown encoding 'plain'; known: float, int8, remap"),
        ("dense", ["int8"], r"unknown encoding \['int8'\]; known: float"),
    ],
)
def test_unknown_names_list_the_known_ones(structure: object, encoding: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_named(structure, encoding)


@formats(*OURS)
@given(m=st.integers(1, 90), n=st.integers(1, 90), size=st.sampled_from([1, 2, 4, 8]), data=st.data())
def test_bytes_of_ours_are_those_of_the_tensors(
    format: Format, m: int, n: int, size: int, data: st.DataObject
) -> None:
    rank = rank_of(format, data.draw(st.integers(1, min(m, n))))
    assert format.bytes(m, n, rank, size) == listed_bytes(format.tensors(m, n, rank, bias=False), size)
    if format.key in SIZES:
        assert format.bytes(m, n, rank, size) == SIZES[format.key](m, n, rank or 0, size)


@formats(*GPTQ)
@given(m=st.integers(1, 9), n=st.integers(1, 9), data=st.data())
def test_bytes_of_gptq_are_those_of_the_tensors(format: Format, m: int, n: int, data: st.DataObject) -> None:
    rank = rank_of(format, 32 * data.draw(st.integers(1, min(m, n))))
    m, n = 32 * m, 32 * n
    assert format.unsupported_reason(m, n, rank) is None or (format.key[0], rank) == ("pivoted", m)
    # Its scales have 16 bits whatever the model has.
    tensors = format.tensors(m, n, rank, bias=False)
    assert format.bytes(m, n, rank, 4) == format.bytes(m, n, rank, 2) == listed_bytes(tensors, 2)


@formats(*BITSANDBYTES)
@given(m=st.integers(1, 5), n=st.integers(1, 5), data=st.data())
def test_bytes_of_bitsandbytes_are_those_of_the_tensors_and_of_its_notes_on_every_linear(
    format: Format, m: int, n: int, data: st.DataObject
) -> None:
    rank = rank_of(format, 64 * data.draw(st.integers(1, min(m, n))))
    m, n = 64 * m, 64 * n
    assert format.encoding.has_more_tensors
    linears = format.linears(m, n, rank)
    notes = format.bytes(m, n, rank, 2) - listed_bytes(format.tensors(m, n, rank, bias=False), 2)
    if format.encoding.name == "llm_int8":
        assert notes == len(linears)
    elif format.encoding.name.endswith("_dq"):  # a code of 256 values and an offset besides
        assert 1024 < notes / len(linears) < 1500
    else:
        assert 64 < notes / len(linears) < 250


@formats(*OURS, *GPTQ, *BITSANDBYTES)
def test_bytes_are_those_of_the_linears_one_by_one_and_multiply_adds_their_elements(format: Format) -> None:
    m, n, rank = 256, 128, rank_of(format, 64)
    linears = format.linears(m, n, rank)
    assert {name: (shape.out_features, shape.in_features) for name, shape in linears.items()} == (
        format.structure.linears(m, n, rank)
    )
    assert {shape.full_rank for shape in linears.values()} == {128}
    own = format.structure.own_bytes(m, n, rank)
    assert format.bytes(m, n, rank, 2) == own + sum(format.encoding.bytes(each, 2) for each in linears.values())
    assert format.macs(m, n, rank) == sum(each.out_features * each.in_features for each in linears.values())
    known = {"dense": m * n, "low_rank": 64 * (m + n), "pivoted": 64 * (m + n - 64)}
    assert format.macs(m, n, rank) == known.get(format.structure.structure, format.macs(m, n, rank))
    left_out = format.structure.has_rank and not format.loss_is_measured
    assert format.relative_error == (0 if left_out else len(linears) * format.encoding.relative_error)


@formats(*OURS, "llm_int8")
@given(m=st.integers(1, 99), n=st.integers(1, 99), rank=st.integers(1, 99))
def test_ours_and_llm_int8_take_any_shape(format: Format, m: int, n: int, rank: int) -> None:
    rank = min(rank, m, n)
    reason = format.unsupported_reason(m, n, rank_of(format, rank))
    if format.structure.structure == "pivoted" and rank == m:
        assert reason == f"structure 'pivoted' at rank {m} has all rows of the matrix in its first linear"
    else:
        assert reason is None


@formats(*GPTQ, "nf4", "fp4_dq", "gptq4_g128", "gptq4_rows")
@given(m=st.integers(1, 300), n=st.integers(1, 300), rank=st.integers(1, 300))
def test_shapes_that_cannot_be_stored_are_said(format: Format, m: int, n: int, rank: int) -> None:
    name, needed = format.encoding.name, {"nf4": (1, 64), "fp4_dq": (1, 64), "gptq4_g128": (32, 128)}
    outputs, inputs = needed.get(name, (32, 32))
    reasons = []
    if m % outputs:
        reasons.append(f"{name} takes outputs in multiples of {outputs}, and it has {m}")
    if n % inputs:
        reasons.append(f"{name} takes inputs in multiples of {inputs}, and it has {n}")
    assert format.unsupported_reason(m, n) == (reasons[0] if reasons else None)
    if format.structure.has_rank and rank % inputs:
        reasons.append(f"{name} takes ranks in multiples of {inputs}, and it is to have {rank}")
    if format.structure.structure == "pivoted" and rank >= m:
        reasons.append(f"structure 'pivoted' at rank {rank} has all rows of the matrix in its first linear")
    assert format.unsupported_reason(m, n, rank_of(format, rank)) == (reasons[0] if reasons else None)


@given(m=st.integers(1, 300), n=st.integers(1, 300), size=st.sampled_from([1, 2, 4]))
def test_every_encoding_breaks_even_where_its_next_rank_is_not_smaller_than_dense(m: int, n: int, size: int) -> None:
    for encoding in OURS:
        largest = format_named("low_rank", encoding).largest_rank_below(m * n * size, m, n, size)
        assert 0 <= largest <= min(m, n)
        bytes_of = SIZES["low_rank", encoding]
        assert largest == 0 or bytes_of(m, n, largest, size) < m * n * size
        assert largest == min(m, n) or bytes_of(m, n, largest + 1, size) >= m * n * size


def test_break_even_ranks_of_a_square_matrix_in_16_bits() -> None:
    found = {name: format_named("low_rank", name).largest_rank_below(2 * 64 * 64, 64, 64, 2) for name in OURS}
    # 8192 bytes dense. Of a rank: 256 bytes; 128 bytes and a scale; 64 slots and a scale. And 64 scales of rows.
    assert found == {"float": 31, "int8": 62, "remap": 62}


def headers_of(module: nn.Module) -> dict[str, tuple[list[int], str | None]]:
    """Shapes and dtypes of a module's tensors as files' headers have them, the empty one aside."""
    names = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32"}
    tensors = {name: tensor for name, tensor in module.state_dict().items() if tensor.numel()}
    return {name: (list(tensor.shape), names.get(tensor.dtype)) for name, tensor in tensors.items()}


@formats(*OURS, *GPTQ)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 96), (64, 64)])
def test_a_place_for_its_tensors_has_those_that_it_lists(format: Format, bias: bool, m: int, n: int) -> None:
    dense = nn.Linear(n, m, bias=bias, device="meta", dtype=torch.bfloat16)
    module = format.empty(dense, rank_of(format, 32))
    assert headers_of(module) == format.tensors(m, n, rank_of(format, 32), bias)
    assert all(tensor.is_meta for tensor in module.parameters())
    assert module.weight.numel() == 0, "so that a reader of dense models finds a weight of the wrong size"
    assert (module.structure, module.encoding, module.rank) == (*format.key, rank_of(format, 32))
    assert (module.bias is not None) == bias


def source_of(format: Format, m: int, n: int) -> Factors | Tensor:
    generator = torch.Generator().manual_seed(0)
    factors = Factors(
        torch.randn(m, 16, generator=generator, dtype=torch.float64),
        torch.randn(16, n, generator=generator, dtype=torch.float64),
    )
    return factors if format.structure.has_rank else factors.product()


def made(format: Format, m: int, n: int, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A module of the format with values in it."""
    weights = format.structure.written(source_of(format, m, n), format.encoding.gauge, dtype)
    dense = nn.Linear(n, m, bias=bias is not None, device="meta", dtype=dtype)
    module = format.empty(dense, rank_of(format, 16))
    parameter = None if bias is None else nn.Parameter(bias)
    children, matrices = format.quantize(weights, parameter, dtype, min(m, n))
    for name, child in children.items():
        module.set_submodule(name, child)
    module.put_own(weights, parameter)
    for name, matrix in module.matrices().items():
        torch.testing.assert_close(matrix, matrices[name].to(matrix), rtol=0, atol=0)
    return module


@formats(*OURS)
@pytest.mark.parametrize(("m", "n"), [(48, 32), (32, 48), (40, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_quantized_has_the_listed_tensors_and_computes_the_matrix(
    format: Format, m: int, n: int, dtype: torch.dtype
) -> None:
    bias = torch.randn(m, generator=torch.Generator().manual_seed(1)).to(dtype)
    module = made(format, m, n, bias, dtype)
    assert headers_of(module) == format.tensors(m, n, rank_of(format, 16), bias=True)
    source = source_of(format, m, n)
    exact = source.product() if isinstance(source, Factors) else source
    assert float((module.dense_matrix() - exact).norm() / exact.norm()) < 0.03
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = x.double() @ module.dense_matrix().double().T + bias.double()
    found = module(x).detach()
    assert found.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert float((found.double() - expected).norm() / expected.norm()) < tolerance
    dense = to_dense(module)
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, module.dense_matrix().to(dtype))
    assert torch.equal(dense.bias, bias)
    stored = sum(tensor.nbytes for tensor in module.state_dict().values()) - bias.nbytes
    assert stored == format.bytes(m, n, rank_of(format, 16), torch.finfo(dtype).bits // 8)
    assert macs_per_token(module) == format.macs(m, n, rank_of(format, 16))


@pytest.mark.parametrize("encoding", ["remap"])
def test_an_encoding_of_scaled_factors_does_not_go_with_fixed_ones(encoding: str) -> None:
    format = format_named("pivoted", encoding)
    assert format.conflict == f"{encoding} is for factors that can be scaled, and structure 'pivoted' fixes them"
    assert format.unsupported_reason(96, 64, 16) == format.unsupported_reason(96, 64) == format.conflict
    assert format_named("low_rank", encoding).conflict is None is format_named("dense", encoding).conflict


@formats("float")
def test_factors_that_overflow_are_refused(format: Format) -> None:
    weights = {name: 1e9 * torch.ones(*shape) for name, shape in format.structure.linears(4, 6, 2).items()}
    with pytest.raises(
        ValueError, match=r"does not fit into torch.float16: its values overflow; load the model in bf"
    ):
        format.quantize(weights, None, torch.float16, 4)
