"""What an encoding is told about the inputs of the linears that it quantizes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration_tests.statistics.tiny_model_statistics import assert_gram_close, inputs_by_linear, windows_of
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.calibration.paired import PairedRunner
from optimum_dobisvd.encodings.bitsandbytes import FourBit
from optimum_dobisvd.factorization.factors import Factors
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.model.offloaded import dense_weight
from optimum_dobisvd.pipeline.quantize import quantize_sequentially
from optimum_dobisvd.statistics.collect import InputCollector
from optimum_dobisvd.statistics.store import full_gram
from optimum_dobisvd.structures.base import compressed_linears
from optimum_dobisvd.structures.format import format_named
from optimum_dobisvd.structures.placement import replace_linear


class GramKeeper(FourBit):
    """Rounds nothing and keeps the Grams, in the order of the linears."""

    def __init__(self) -> None:
        super().__init__("nf4", nested=False)
        self.grams: list[Tensor] = []

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        assert gram is not None
        self.grams.append(gram)
        linear.weight = nn.Parameter(linear.weight.detach().to(dtype))
        return linear, linear.weight.detach()


def windows_with_padding(side: str) -> tuple[Tensor, Tensor, list[int]]:
    """Three windows, their mask, and how many tokens of each are no padding."""
    ids, mask = tokens(3, 96), torch.ones(3, 96, dtype=torch.bool)
    lengths = [96, 40, 64] if side != "none" else [96, 96, 96]
    for row, length in enumerate(lengths):
        mask[row, length:] = False
        if side == "left":
            mask[row] = mask[row].flip(0)
    return ids, mask, lengths


def grams_with_weighted_first_tokens(model: Any, names: list[str], side: str) -> dict[str, Tensor]:
    """`H` of every linear, a window's first token counting as a 32nd of it."""
    ids, mask, lengths = windows_with_padding(side)
    expected = {name: torch.zeros(()) for name in names}
    for row, length in enumerate(lengths):
        for name, x in inputs_by_linear(model, names, ids[row : row + 1, mask[row]]).items():
            weights = torch.ones(length, dtype=torch.float64)
            weights[0] = max(1, length / 32)
            expected[name] = expected[name] + (x * weights) @ x.T
    return expected


def quantize_keeping_grams(model: Any, side: str, one_input_at_a_time: bool) -> list[Tensor]:
    """Quantize all compressed linears on these windows; returns the Grams."""
    ids, mask, _ = windows_with_padding(side)
    keeper = GramKeeper()
    runner = PairedRunner(model, find_layout(model).blocks, windows_of(ids, mask), batch_size=2)
    quantize_sequentially(compressed_linears(model), {"nf4": keeper}, runner, one_input_at_a_time=one_input_at_a_time)
    return keeper.grams


@pytest.mark.parametrize("one_input_at_a_time", [False, True])
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_the_first_token_of_every_window_counts_as_a_part_of_the_window(side: str, one_input_at_a_time: bool) -> None:
    """Attention rests on it, so what rounding does to it is felt at all others."""
    model = tiny("llama")
    names = list(find_layout(model).linears)
    expected = grams_with_weighted_first_tokens(model, names, side)
    for name in names:
        weight = dense_weight(model.get_submodule(name))
        replace_linear(model, name, format_named("dense", "nf4"), None, weight)
    grams = quantize_keeping_grams(model, side, one_input_at_a_time)
    assert len(grams) == len(names)
    for name, gram in zip(names, grams, strict=True):
        assert_gram_close(gram, expected[name], 1e-4)


@pytest.mark.parametrize("structure", ["low_rank", "pivoted"])
def test_the_outer_factor_is_told_what_the_inner_one_gives(structure: str) -> None:
    model = tiny("llama")
    names = list(find_layout(model).linears)
    for name in names:
        left, values, right = torch.linalg.svd(dense_weight(model.get_submodule(name)), full_matrices=False)
        factors = Factors(left[:, :12] * values[:12], right[:12])
        replace_linear(model, name, format_named(structure, "nf4"), 12, factors)
    children = [f"{name}.{child}" for name in names for child in ("first", "second")]
    expected = grams_with_weighted_first_tokens(model, children, "right")
    grams = quantize_keeping_grams(model, "right", one_input_at_a_time=True)
    assert len(grams) == len(children)
    for name, gram in zip(children, grams, strict=True):
        assert_gram_close(gram, expected[name], 1e-4)


def test_linears_that_are_given_some_of_the_tokens_count_each_as_one() -> None:
    """A router does not say which tokens it hands on, so their weights are not known."""
    some, every = nn.Linear(8, 8), nn.Linear(8, 8)
    found: dict[str, Any] = {}
    linears = {"some": some, "every": every}
    collector = InputCollector(lambda _: linears, found.__setitem__, lambda _: True, lambda mask: 5.0 * mask)
    collector.enter("block", nn.Module())
    collector.start_batch(torch.ones(2, 6, dtype=torch.bool))
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    half = x[:, ::2]
    some(half)
    every(x)
    collector.leave("block", nn.Module())
    for name, rows, times in (("some", half.flatten(0, 1), 1), ("every", x.flatten(0, 1), 5)):
        assert_gram_close(full_gram(found["block"].inputs[name]), times * (rows.T @ rows).double())
