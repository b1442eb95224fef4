"""The sizes one matrix can take, in order."""

from fractions import Fraction

import pytest

from optimum_dobisvd.allocation.options import dense_formats, size_options
from optimum_dobisvd.allocation.plan import PlannedModule, planned_bytes
from optimum_dobisvd.model.target import Target
from optimum_dobisvd.structures.format import format_named

SQUARE = Target("layers.0.q_proj", 64, 64, 2)
SMOLLM2 = Target("layers.0.o_proj", 576, 576, 2)


def dense_names(target: Target, encoding: str) -> list[str]:
    found = dense_formats(target, format_named("low_rank", encoding))
    assert {format.structure.structure for format in found} == {"dense"}
    return [format.encoding.name for format in found]


def test_dense_int8_comes_before_the_matrix_as_it_is_where_it_is_smaller() -> None:
    assert dense_names(SQUARE, "int8") == ["int8", "float"]
    assert dense_names(SQUARE, "float") == ["float"]
    assert dense_names(SQUARE, "remap") == ["float"]
    column = Target("a", 64, 1, 2)
    assert dense_names(column, "int8") == ["float"], "64 bytes and 128 of scales"


def test_where_an_encoding_cannot_take_the_matrix_8_and_16_bits_are_left() -> None:
    assert dense_names(SMOLLM2, "gptq4_g128") == ["int8", "float"]
    assert dense_names(SMOLLM2, "gptq4_g64") == ["gptq4_g64", "int8", "float"]
    assert dense_names(SMOLLM2, "nf4") == ["nf4", "int8", "float"]
    assert dense_names(Target("a", 576, 100, 2), "nf4") == ["int8", "float"]
    # Eight bits of bitsandbytes take more bytes than ours.
    assert dense_names(SMOLLM2, "llm_int8") == ["int8", "llm_int8", "float"]


@pytest.mark.parametrize(
    ("encoding", "multiple", "lowest"),
    [
        ("float", 1, 1),
        ("int8", 16, 16),
        ("remap", 16, 16),
        ("gptq4_g32", 32, 32),
        ("gptq4_g64", 64, 64),
        ("nf4", 64, 64),
    ],
)
def test_ranks_are_multiples_of_what_the_encoding_likes(encoding: str, multiple: int, lowest: int) -> None:
    options = size_options(SMOLLM2, format_named("low_rank", encoding), None, 1)
    assert (options.ranks[0], options.ranks.step) == (lowest, multiple)
    assert (
        size_options(SMOLLM2, format_named("low_rank", encoding), None, 65).ranks[0] == -(-65 // multiple) * multiple
    )


@pytest.mark.parametrize("encoding", ["float", "int8", "remap", "gptq4_g32", "gptq8_g64", "nf4", "nf4_dq", "llm_int8"])
def test_options_are_ranks_and_then_the_matrix_not_factorized_in_ascending_bytes(encoding: str) -> None:
    options = size_options(SMOLLM2, format_named("low_rank", encoding), None, 1)
    modules = [options.module_at(option) for option in range(len(options))]
    sizes = [options.bytes_at(option) for option in range(len(options))]
    assert [module.rank for module in modules] == [*options.ranks, *[None] * len(options.dense)]
    assert {module.encoding for module in modules if module.rank} == {encoding}
    assert modules[-1] == PlannedModule("dense", "float")
    assert sizes == [planned_bytes(SMOLLM2, module) for module in modules] == sorted(sizes)
    assert sizes[-1] == SMOLLM2.dense_bytes
    assert len(set(sizes)) == len(sizes)
    for option, size in enumerate(sizes):
        assert options.option_within(size) == option
        assert options.option_within(Fraction(2 * size - 1, 2)) == option - 1
    beyond = options.ranks[-1] + options.ranks.step
    too_large = options.format.bytes(576, 576, beyond, 2) >= options.bytes_at(len(options.ranks))
    assert too_large or beyond > 576


def test_a_structure_without_rank_offers_only_encodings() -> None:
    options = size_options(SMOLLM2, format_named("dense", "gptq4_g32"), None, 1)
    assert [options.module_at(option) for option in range(len(options))] == [
        PlannedModule("dense", encoding) for encoding in ("gptq4_g32", "int8", "float")
    ]


def test_a_matrix_that_an_encoding_cannot_take_has_no_ranks_in_it() -> None:
    assert not size_options(SMOLLM2, format_named("low_rank", "gptq4_g128"), None, 1).ranks


@pytest.mark.parametrize(
    ("encoding", "multiple"), [("gptq4_g32", 8), ("gptq4_g64", 32), ("nf4", 32), ("gptq2_rows", 31)]
)
def test_multiples_that_the_encoding_cannot_take_are_refused(encoding: str, multiple: int) -> None:
    format = format_named("low_rank", encoding)
    needed = format.encoding.required_rank_multiple
    with pytest.raises(
        ValueError,
        match=f"rank_multiple is {multiple}, and {encoding} takes ranks in multiples of {needed} only; leave "
        f"rank_multiple out, or make it a multiple of {needed}",
    ):
        size_options(SMOLLM2, format, multiple, 1)
    assert size_options(SMOLLM2, format, 2 * needed, 1).ranks.step == 2 * needed
    assert size_options(SMOLLM2, format_named("low_rank", "int8"), 3, 1).ranks.step == 3, "a wish, not a need"
