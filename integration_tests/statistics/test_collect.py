"""The collected statistics are those of the whole model's forward pass, for every kind of architecture."""

from typing import Any

import pytest
import torch
from torch import nn

from integration_tests.statistics.tiny_model_statistics import assert_gram_close, collect, grams_of, inputs_by_linear
from integration_tests.tiny_models import MODEL_TYPES, tiny, tokens
from optimum_dobisvd.calibration import temporarily
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.statistics.collect import InputCollector
from optimum_dobisvd.statistics.store import full_gram

# Inputs per block, each shared by the linears that are given the same tensor: usually q/k/v, o, gate/up and down.
INPUTS = dict.fromkeys(MODEL_TYPES, 4) | {
    "phi": 3,  # fc1 reads the same normalized states as q/k/v
    "mixtral": 2,  # the experts are no linears
}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_grams_block_by_block_are_those_of_full_forward_passes(model_type: str) -> None:
    model = tiny(model_type)
    layout = find_layout(model)
    ids = tokens(5, 24)  # the last batch is smaller
    store = collect(model, ids)
    found = grams_of(store, layout.blocks)
    expected = inputs_by_linear(model, layout.linears, ids)
    assert found.keys() == layout.linears.keys()
    for name, x in expected.items():
        assert_gram_close(found[name], x @ x.T)
    for block in layout.blocks:
        statistics = store.block(block)
        assert len(statistics.inputs) == INPUTS[model_type]
        for name, inputs in statistics.inputs.items():
            assert statistics.input_key[name] == name
            assert inputs.tokens == 5 * 24
            torch.testing.assert_close(inputs.abs_mean.double(), expected[name].abs().mean(1), rtol=1e-5, atol=1e-7)


def test_the_linears_that_share_an_input_are_the_ones_that_should() -> None:
    model = tiny("llama")
    input_key = collect(model, tokens(2, 16)).block("model.layers.1").input_key
    short = {name.rsplit(".", 1)[1]: key.rsplit(".", 1)[1] for name, key in input_key.items()}
    assert short == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "q_proj"),
        "o_proj": "o_proj",
        **dict.fromkeys(("gate_proj", "up_proj"), "gate_proj"),
        "down_proj": "down_proj",
    }


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_the_blocks_of_the_tiny_gemmas_really_get_different_arguments(model_type: str) -> None:
    """Guards the comparison above: with one mask for all blocks it would say nothing about masks by layer."""
    model = tiny(model_type)
    masks = []
    for block in find_layout(model).blocks.values():
        block.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    model(tokens(1, 24))
    kinds = {None if mask is None else int(mask.bool().sum()) for mask in masks}
    assert len(kinds) == 2


# GPT-2 counts its absolute positions from the padding on: padded on the left it computes something else.
@pytest.mark.parametrize(
    ("model_type", "side"),
    [(name, "right") for name in ("llama", "mistral", "gemma2", "gemma3_text", "opt", "gpt2", "gpt_neox")]
    + [(name, "left") for name in ("llama", "mistral", "gemma2", "gemma3_text", "opt", "gpt_neox")],
)
def test_padding_leaves_no_trace(model_type: str, side: str) -> None:
    """Padded windows give the statistics of the same tokens run one by one without padding."""
    model = tiny(model_type)
    layout = find_layout(model)
    lengths = [24, 9, 17, 1]
    ids, mask = tokens(4, 24), torch.zeros(4, 24, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(24 - length, 24)] = True
    store = collect(model, ids, mask, batch_size=3)
    found = grams_of(store, layout.blocks)
    alone = [inputs_by_linear(model, layout.linears, ids[row : row + 1, mask[row]]) for row in range(4)]
    for name in layout.linears:
        x = torch.cat([each[name] for each in alone], 1)
        assert_gram_close(found[name], x @ x.T, tolerance=2e-4)  # other kernels for other lengths
    for block in layout.blocks:
        for name, inputs in store.block(block).inputs.items():
            assert inputs.tokens == sum(lengths)
            expected = torch.cat([each[name] for each in alone], 1).abs().mean(1)
            torch.testing.assert_close(inputs.abs_mean.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_not_formed_in_the_models_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporarily, "has_bf16_products", lambda: True)  # else blocks would not run in it either
    model = tiny("llama", dtype=dtype)
    layout = find_layout(model)
    ids = tokens(4, 32)
    found = grams_of(collect(model, ids), layout.blocks)
    for name, x in inputs_by_linear(model, layout.linears, ids).items():
        assert_gram_close(found[name], x @ x.T)


def test_batch_size_changes_nothing_but_rounding() -> None:
    model = tiny("qwen2")
    blocks = find_layout(model).blocks
    one, other = (grams_of(collect(model, tokens(6, 16), batch_size=size), blocks) for size in (1, 6))
    for name, gram in one.items():
        assert_gram_close(other[name], gram)


def test_excluded_linears_are_not_watched() -> None:
    model = tiny("llama")
    store = collect(model, tokens(2, 16), exclude=["q_proj", "layers.1"])
    assert store.block("model.layers.0").input_key["model.layers.0.self_attn.k_proj"].endswith("k_proj")
    assert not any(name.endswith("q_proj") for name in store.block("model.layers.0").input_key)
    assert store.block("model.layers.1").inputs == {}
    assert store.block("model.layers.2").inputs


def test_a_linear_that_is_never_called_is_no_target() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.spare = nn.Linear(32, 32)
    layout = find_layout(model)
    assert "model.layers.1.mlp.spare" not in layout.linears
    assert layout.describe_left_dense() == "1,024 parameters not called on a text"
    store = collect(model, tokens(2, 16))
    assert "model.layers.1.mlp.spare" not in store.block("model.layers.1").input_key
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rows_that_are_not_tokens_cannot_be_told_from_padding() -> None:
    """A router hands an expert some tokens only: with padding about, their rows would be counted wrongly."""

    class Halved(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x[:, ::2]).repeat_interleave(2, 1)[:, : x.shape[1]]

    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Halved(mlp.up_proj)
    mask = torch.ones(2, 16, dtype=torch.bool)
    assert (
        collect(model, tokens(2, 16), mask).block("model.layers.0").inputs["model.layers.0.mlp.up_proj.inner"].tokens
        == 16
    )
    mask[1, 9:] = False
    with pytest.raises(
        ValueError, match=r"mlp\.up_proj\.inner is given 8 rows .1 x 8. where the window has 16 tokens"
    ):
        collect(model, tokens(2, 16), mask)


class Again(nn.Module):
    """Calls a linear twice, and others on the same input as the first or the second time."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.twice, self.x_too, self.x_also, self.y_too = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        for step in self.order.split():
            module, which = step.split(":")
            getattr(self, module)(x if which == "x" else y)


@pytest.mark.parametrize(
    "order",
    [
        "twice:x x_too:x x_also:x twice:y y_too:y",
        "x_too:x twice:x x_also:x twice:y y_too:y",
        "x_too:x twice:x twice:y x_also:x y_too:y",
        "y_too:y x_too:x x_also:x twice:x twice:y",
        "twice:x twice:y x_too:x x_also:x y_too:y",
    ],
)
def test_a_linear_that_is_called_twice_shares_its_inputs_with_none_that_is_not(order: str) -> None:
    block = Again(order)
    linears = dict(block.named_children())
    found: dict[str, Any] = {}
    collector = InputCollector(lambda _: linears, found.__setitem__, lambda _: True)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 2, 5, 6, generator=generator) for _ in range(2))
    collector.enter("block", block)
    for batch in range(3):
        collector.start_batch(torch.ones(2, 5, dtype=torch.bool))
        block(x[batch], y[batch])
    collector.leave("block", block)
    grams = {name: each.flatten(0, 2).T @ each.flatten(0, 2) for name, each in (("x", x), ("y", y))}
    expected = {"twice": grams["x"] + grams["y"], "x_too": grams["x"], "x_also": grams["x"], "y_too": grams["y"]}
    for name, key in found["block"].input_key.items():
        assert_gram_close(full_gram(found["block"].inputs[key]), expected[name].double())
        assert found["block"].inputs[key].tokens == (60 if name == "twice" else 30)
