"""Statistics of experts: of the tokens that are routed to each, and of the pool where these are too few."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.calibration.backward import BackwardRunner
from optimum_dobisvd.calibration.dataset import CalibrationWindows
from optimum_dobisvd.calibration.loss import NextTokenLoss
from optimum_dobisvd.calibration.runner import BlockRunner
from optimum_dobisvd.model.experts import linearize
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.statistics.collect import BlockStatistics, InputCollector
from optimum_dobisvd.statistics.gradients import GradientCollector, GradientStatistics
from optimum_dobisvd.statistics.store import StatisticsStore, full_gram

LAYER = "model.layers.1"
EXPERTS = f"{LAYER}.mlp.experts"


def windows(ids: Tensor, mask: Tensor | None = None) -> CalibrationWindows:
    return CalibrationWindows(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, {})


def collected(model: nn.Module, given: CalibrationWindows, batch_size: int = 2) -> dict[str, BlockStatistics]:
    layout, found = find_layout(model), {}
    collector = InputCollector(layout.linears_of, found.__setitem__, lambda _: True)
    BlockRunner(model, layout.blocks, given, batch_size=batch_size).run(collector)
    return found


def gradients(model: nn.Module, given: CalibrationWindows) -> dict[str, dict[str, GradientStatistics]]:
    layout, found = find_layout(model), {}
    collector = GradientCollector(layout.linears_of, found.__setitem__, lambda _: True)
    BackwardRunner(model, layout.blocks, given, batch_size=2).run_backward(collector, NextTokenLoss())
    return found


def routed(model: nn.Module, given: CalibrationWindows) -> list[Tensor]:
    """By expert of one layer of the model with stacked experts: the hidden states of text that are routed to it."""
    seen: list[tuple[Tensor, Tensor]] = []
    mlp: Any = model.get_submodule(f"{LAYER}.mlp")

    def note(_module: nn.Module, args: tuple, _output: Any) -> None:
        seen.append((args[0].double(), args[1]))

    handle = mlp.experts.register_forward_hook(note)
    with torch.no_grad():
        model(input_ids=given.input_ids, attention_mask=given.attention_mask.long())
    handle.remove()
    hidden, index = seen[0]
    keep = given.attention_mask.reshape(-1)[:, None]
    return [hidden[((index == expert) & keep).nonzero()[:, 0]] for expert in range(4)]


def favoring(model: nn.Module, never: int) -> nn.Module:
    """The model, one expert of one layer of which the router never chooses; it takes the next one, perhaps twice."""
    gate: Any = model.get_submodule(f"{LAYER}.mlp.gate")
    real = type(gate).forward

    def forward(hidden: Tensor) -> Any:
        found, scores, index = real(gate, hidden)
        return found, scores, torch.where(index == never, (index + 1) % 4, index)

    gate.forward = forward
    return model


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_grams_are_of_the_tokens_routed_to_each_expert_and_of_no_padding(model_type: str, padded: bool) -> None:
    ids = tokens(6, 40)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[:, 33:] = False
        mask[1, 20:] = False
    given = windows(ids, mask)
    expected = routed(tiny(model_type), given)
    model = tiny(model_type)
    linearize(model)
    found = collected(model, given)[LAYER]
    for expert, x in enumerate(expected):
        key = found.input_key[f"{EXPERTS}.{expert}.up_proj"]
        assert key == f"{EXPERTS}.{expert}.gate_proj"
        assert found.inputs[key].tokens == len(x)
        torch.testing.assert_close(full_gram(found.inputs[key]), x.T @ x, rtol=1e-4, atol=1e-3)
    assert found.borrowed == []
    shares = [found.inputs[f"{EXPERTS}.{expert}.gate_proj"].tokens for expert in range(4)]
    assert sum(shares) == 2 * int(mask.sum())


def test_gradients_are_those_at_the_experts_outputs_padding_left_out() -> None:
    """The sum over the experts of `g y` is what autograd gives for a scale of each one's output."""
    ids = tokens(4, 40)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 30:] = False
    model = tiny("mixtral")
    experts = linearize(model)
    found = gradients(model, windows(ids, mask))[LAYER]
    down = experts[EXPERTS].linear(2, "down_proj")
    scale = torch.ones((), dtype=torch.float32, requires_grad=True)
    handle = down.register_forward_hook(lambda _module, _args, output: output * scale)
    total = torch.zeros(())
    for row in ids:
        logits = model(input_ids=row[None][:, :30]).logits
        total = total + nn.functional.cross_entropy(logits[0, :-1], row[1:30], reduction="sum")
    total.backward()
    handle.remove()
    assert scale.grad is not None
    assert found[f"{EXPERTS}.2.down_proj"].first_order == pytest.approx(float(scale.grad), rel=1e-3)


def test_an_expert_that_is_never_chosen_borrows_what_the_others_see() -> None:
    given = windows(tokens(6, 40))
    expected = routed(favoring(tiny("mixtral"), never=2), given)
    assert len(expected[2]) == 0
    model = favoring(tiny("mixtral"), never=2)
    linearize(model)
    found = collected(model, given)[LAYER]
    assert sorted(found.borrowed) == [f"{EXPERTS}.2.{name}" for name in ("down_proj", "gate_proj", "up_proj")]
    pooled = found.inputs[found.input_key[f"{EXPERTS}.2.gate_proj"]]
    assert found.input_key[f"{EXPERTS}.2.up_proj"] == found.input_key[f"{EXPERTS}.2.gate_proj"]
    assert pooled.tokens == sum(map(len, expected))
    torch.testing.assert_close(full_gram(pooled), sum(x.T @ x for x in expected), rtol=1e-4, atol=1e-3)
    inner = [full_gram(found.inputs[f"{EXPERTS}.{expert}.down_proj"]) for expert in (0, 1, 3)]
    borrowed = full_gram(found.inputs[found.input_key[f"{EXPERTS}.2.down_proj"]])
    torch.testing.assert_close(borrowed, sum(inner), rtol=1e-4, atol=1e-3)


def test_an_expert_with_fewer_tokens_than_features_borrows_and_one_that_saw_all_the_text_does_not() -> None:
    model = tiny("mixtral")
    linearize(model)
    found = collected(model, windows(tokens(1, 30)))[LAYER]  # 60 choices for 4 experts of 32 and 48 features
    few = {name for name in find_layout(model).linears_of(LAYER) if ".experts." in name}
    assert set(found.borrowed) == few
    assert found.inputs[f"{LAYER}.self_attn.q_proj"].tokens == 30  # its own, few as they are


def test_a_gradient_that_is_borrowed_is_the_pools_mean_for_the_tokens_there_were() -> None:
    given = windows(tokens(6, 40))
    model = favoring(tiny("mixtral"), never=2)
    linearize(model)
    found = gradients(model, given)[LAYER]
    others = [found[f"{EXPERTS}.{expert}.up_proj"] for expert in (0, 1, 3)]
    borrowed = found[f"{EXPERTS}.2.up_proj"]
    assert borrowed.tokens == 1
    mean = sum(full_gram(each) for each in others) / sum(each.tokens for each in others)
    torch.testing.assert_close(full_gram(borrowed), mean, rtol=1e-4, atol=1e-8)
    assert borrowed.energy == pytest.approx(float(mean.trace()), rel=1e-4)


def test_what_was_borrowed_is_read_back_from_a_folder(tmp_path: Any) -> None:
    model = favoring(tiny("mixtral"), never=2)
    linearize(model)
    found = collected(model, windows(tokens(6, 40)))
    StatisticsStore({}, list(found), tmp_path / "statistics").put(LAYER, found[LAYER])
    read = StatisticsStore({}, list(found), tmp_path / "statistics").block(LAYER)
    assert read.borrowed == found[LAYER].borrowed
    assert read.input_key == found[LAYER].input_key


def test_a_whole_layer_that_is_never_reached_is_still_an_error() -> None:
    model = tiny("mixtral")
    linearize(model)
    model.get_submodule(f"{LAYER}.mlp").forward = lambda hidden: hidden  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.0\.gate_proj was never called"):
        collected(model, windows(tokens(4, 40)))
