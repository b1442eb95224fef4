"""Experts that are kept stacked, as linears: the same function, the same weights, and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from integration_tests.checkpoint.reloading import OFFLOADED
from integration_tests.tiny_models import MIXTURE_TYPES, tiny, tokens
from optimum_dobisvd.model.experts import LinearizedExperts, fuse, linearize, linearized_experts, router_names
from optimum_dobisvd.model.layout import ROUTER, find_layout

IDS = tokens(3, 20)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("model_type", MIXTURE_TYPES)
def test_linearized_experts_compute_what_the_stacked_ones_did(model_type: str) -> None:
    model = tiny(model_type)
    expected = logits(model)
    assert linearize(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not [name for name, each in model.named_parameters() if "experts" in name and each.dim() == 3]
    assert linearize(model) == {}


@pytest.mark.parametrize("model_type", MIXTURE_TYPES)
def test_fusing_gives_the_very_parameters_back(model_type: str) -> None:
    """Also after the stacked weights were let go of, when only the linears hold them."""
    model = tiny(model_type)
    before, identities = weights_of(model), {name: id(each) for name, each in model.named_parameters()}
    for experts in linearize(model).values():
        experts.release()
    fuse(model)
    assert {name: id(each) for name, each in model.named_parameters()} == identities
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
    assert linearized_experts(model) == {}


def test_linears_are_views_until_they_are_changed() -> None:
    """A model is never in memory twice."""
    model = tiny("qwen3_moe")
    stacked = model.model.layers[0].mlp.experts.gate_up_proj
    experts = linearize(model)["model.layers.0.mlp.experts"]
    assert experts.linear(3, "up_proj").weight.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    experts.release()
    assert stacked.numel() == 0


@pytest.mark.parametrize("model_type", MIXTURE_TYPES)
def test_layouts_are_found_on_meta_and_in_any_default_dtype(model_type: str) -> None:
    """A model is checked before its weights are there, and built in the dtype that it will have."""
    config, default = tiny(model_type).config, torch.get_default_dtype()
    expected = {name: each.layout for name, each in linearize(tiny(model_type)).items()}
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            model = type(tiny(model_type))(config)
            found = linearize(model)
    finally:
        torch.set_default_dtype(default)
    assert {name: each.layout for name, each in found.items()} == expected
    assert all(parameter.is_meta for parameter in model.parameters())


def test_gate_and_up_of_gpt_oss_are_taken_by_turns_and_have_their_biases() -> None:
    model = tiny("gpt_oss")
    stacked = model.model.layers[1].mlp.experts
    both, bias = stacked.gate_up_proj[2].detach().clone(), stacked.gate_up_proj_bias[2].detach().clone()
    experts = linearize(model)["model.layers.1.mlp.experts"]
    gate, up, down = (experts.linear(2, name) for name in ("gate_proj", "up_proj", "down_proj"))
    assert torch.equal(gate.weight, both[:, 0::2].T)
    assert torch.equal(up.weight, both[:, 1::2].T)
    assert torch.equal(up.bias, bias[1::2])
    assert down.bias is not None


def test_sizes_that_are_alike_do_not_confuse_which_is_which() -> None:
    """As in the real GPT-OSS: as many inner features as inputs."""
    model = tiny("gpt_oss", intermediate_size=32)
    expected = logits(model)
    assert linearize(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model = tiny("mixtral", intermediate_size=16, num_local_experts=32)  # and as many experts
    expected = logits(model)
    assert linearize(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


class _Strange(nn.Module):
    """Experts that nobody knows: their gate is the sine."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 96, 32))
        self.down_proj = nn.Parameter(torch.randn(4, 32, 48))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate, up = (hidden_states @ self.gate_up_proj[0].T).chunk(2, dim=-1)
        return (gate.sin() * up) @ self.down_proj[0].T


def test_what_computes_otherwise_is_left_as_it_is_and_counted() -> None:
    model = tiny("mixtral")
    model.model.layers[1].mlp.experts = _Strange()
    assert set(linearize(model)) == {"model.layers.0.mlp.experts", "model.layers.2.mlp.experts"}
    layout = find_layout(model)
    assert f"{4 * 3 * 48 * 32:,} parameters in _Strange" in layout.describe_left_dense()
    assert layout.coverage < 0.9


def test_experts_that_are_offloaded_are_left_and_it_is_said_what_to_do(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=OFFLOADED, offload_folder=tmp_path / "offload"
    )
    assert set(linearize(model)) == {"model.layers.0.mlp.experts"}  # the only ones in memory
    with pytest.raises(ValueError, match="offloaded .load the model without cpu or disk offload"):
        find_layout(model, min_coverage=0.9)


def test_experts_that_two_layers_share_stay_stacked() -> None:
    model = tiny("mixtral")
    model.model.layers[1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    assert set(linearize(model)) == {"model.layers.2.mlp.experts"}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_all_but_the_routers_is_covered(model_type: str) -> None:
    model = tiny(model_type)
    linearize(model)
    layout = find_layout(model, min_coverage=0.99)
    assert layout.coverage >= 0.99
    assert {left.reason for left in layout.left_dense} == {ROUTER}
    assert {left.name for left in layout.left_dense} == router_names(model)
    inside = [name for name in layout.linears if ".experts." in name]
    stacks = len(linearized_experts(model))
    assert len(inside) == stacks * 4 * 3


def test_an_index_that_is_no_expert_chooses_none() -> None:
    """Expert parallelism sends tokens of other machines so."""
    experts: Any = linearize(tiny("mixtral"))["model.layers.0.mlp.experts"]
    assert isinstance(experts, LinearizedExperts)
    hidden, weights = torch.randn(2, 32), torch.rand(2, 2)
    with torch.no_grad():
        found = experts(hidden, torch.tensor([[4, 1], [4, 4]]), weights)
        alone = experts(hidden[:1], torch.tensor([[1]]), weights[:1, 1:])
    torch.testing.assert_close(found[:1], alone)
    assert not found[1].any()
