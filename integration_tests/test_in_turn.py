"""What a rounder is told about the inputs of the linears it rounds."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration_tests.statistics.collecting import assert_gram_close, inputs_by_linear, windows_of
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.calibration.runner import BlockRunner
from optimum_dobisvd.pipeline.sequential import quantize_in_turn
from optimum_dobisvd.nn.placement import dense_weight, replace_with
from optimum_dobisvd.statistics.collect import InputCollector
from optimum_dobisvd.statistics.store import full_gram


class _Keeper:
    """Rounds nothing and keeps the Grams, in the order of the linears."""

    def __init__(self) -> None:
        self.grams: list[Tensor] = []

    def takes(self, storage: str) -> bool:
        return storage == "nf4"

    def round(self, linear: Any, gram: Tensor, storage: str) -> tuple[nn.Module, Tensor]:
        self.grams.append(gram)
        return linear, linear.weight.detach()


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_the_first_token_of_every_window_counts_as_a_part_of_the_window(side: str, sequential: bool) -> None:
    """Attention rests on it, so what rounding does to it is felt at all others."""
    model = tiny("llama")
    layout = find_layout(model)
    names = list(layout.linears)
    ids, mask = tokens(3, 96), torch.ones(3, 96, dtype=torch.bool)
    lengths = [96, 40, 64] if side != "none" else [96, 96, 96]
    for row, length in enumerate(lengths):
        mask[row, length:] = False
        if side == "left":
            mask[row] = mask[row].flip(0)
    expected = {name: torch.zeros(()) for name in names}
    for row, length in enumerate(lengths):
        for name, x in inputs_by_linear(model, names, ids[row : row + 1, mask[row]]).items():
            weights = torch.ones(length, dtype=torch.float64)
            weights[0] = max(1, length / 32)
            expected[name] = expected[name] + (x * weights) @ x.T
    for name in names:
        weight = dense_weight(model.get_submodule(name))
        replace_with(model, name, "nf4", None, {"whole.weight": weight})
    keeper = _Keeper()
    runner = BlockRunner(model, layout.blocks, windows_of(ids, mask), batch_size=2)
    quantize_in_turn(model, runner, keeper, sequential=sequential)
    assert len(keeper.grams) == len(names)
    for name, gram in zip(names, keeper.grams, strict=True):
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
