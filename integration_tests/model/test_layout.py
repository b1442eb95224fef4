"""Which weights of a model are compressed, which are not, and whether that is said."""

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from integration_tests.tiny_models import MODEL_TYPES, tiny
from optimum_dobisvd.model.layout import EXCLUDED, find_blocks, find_layout
from optimum_dobisvd.model.linears import weight_matrix

LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LINEARS_OF_A_BLOCK = {
    **dict.fromkeys(("llama", "llama_tied", "qwen2", "mistral", "gemma", "gemma2", "gemma3_text"), LLAMA_LIKE),
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
}


def smollm2_on_meta() -> nn.Module:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_a_real_models_matrices_are_all_found_before_any_weight_is_loaded() -> None:
    layout = find_layout(smollm2_on_meta())
    assert len(layout.blocks) == 30
    shapes = Counter((target.out_features, target.in_features) for target in layout.targets)
    assert shapes == {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30}
    assert {target.element_size for target in layout.targets} == {2}
    assert layout.coverage == 1
    assert layout.left_dense == []


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_linear_of_every_block_is_a_target_and_nothing_else(model_type: str) -> None:
    model = tiny(model_type)
    layout = find_layout(model)
    assert len(layout.blocks) == 3
    for block in layout.blocks:
        found = {name.removeprefix(f"{block}.") for name in layout.linears_of(block)}
        expected = LINEARS_OF_A_BLOCK[model_type]
        assert len(found) == len(expected)
        assert all(any(f".{name}".endswith(f".{suffix}") for suffix in expected) for name in found)
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert not outside & {id(module.weight) for module in layout.linears.values()}


def test_targets_have_the_shape_of_the_linear_map_whichever_way_it_is_stored() -> None:
    shapes = {t.name: (t.out_features, t.in_features) for t in find_layout(tiny("gpt2")).targets}
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert shapes["transformer.h.0.mlp.c_proj"] == (32, 48)


def test_weights_tied_between_blocks_are_left_alone_and_reported() -> None:
    model = tiny("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layout = find_layout(model)
    assert len(layout.linears) == 19
    assert not any(name.endswith("up_proj") for name in layout.linears if ".1." not in name)
    assert layout.describe_left_dense() == "3,072 parameters shared with another module"
    assert layout.coverage < 1


def test_a_block_that_is_used_twice_is_left_alone() -> None:
    """Replacing it under one of its names would leave the other dense."""
    model = tiny("llama")
    model.model.layers[2] = model.model.layers[0]
    layout = find_layout(model)
    assert {name.split(".")[2] for name in layout.linears} == {"1"}
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match="no eligible linear in LlamaForCausalLM: .* shared with another module"):
        find_layout(model)


def test_a_mixture_of_experts_is_refused_with_its_parameter_counts() -> None:
    model = tiny("mixtral")
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    with pytest.raises(ValueError, match=r"only 14\.2% of the weights") as error:
        find_layout(model, min_coverage=0.5)
    assert f"{experts:,} parameters in MixtralExperts" in str(error.value)
    assert "384 parameters in MixtralTopKRouter" in str(error.value)
    assert "Lower min_coverage" in str(error.value)


def test_a_mixture_of_experts_can_be_accepted() -> None:
    layout = find_layout(tiny("mixtral"), min_coverage=0)
    attention = sum(weight_matrix(module).numel() for module in layout.linears.values())
    left = sum(entry.parameters for entry in layout.left_dense)
    assert len(layout.linears) == 12
    assert layout.coverage == attention / (attention + left)


def test_exclusions_are_reported_and_do_not_count_as_coverage() -> None:
    model = tiny("llama")
    layout = find_layout(model, ["re:.*down_proj", "layers.1.self_attn"], min_coverage=1.0)
    assert len(layout.linears) == 21 - 3 - 4
    left = {entry.name for entry in layout.left_dense}
    assert left == set(find_layout(model).linears) - set(layout.linears)
    assert {entry.reason for entry in layout.left_dense} == {EXCLUDED}
    assert layout.describe_left_dense() == f"{3 * 48 * 32 + 2 * 32 * 32 + 2 * 16 * 32:,} parameters {EXCLUDED}"


@pytest.mark.parametrize("pattern", ["q_porj", "re:model.layers.7.*", "re:q_proj", "layers.17"])
def test_a_pattern_that_matches_no_module_is_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match="matches no module"):
        find_layout(tiny("llama"), [pattern])


def test_excluding_everything_leaves_no_eligible_linear() -> None:
    with pytest.raises(
        ValueError, match=r"no eligible linear in LlamaForCausalLM: .*excluded by modules_to_not_convert"
    ):
        find_layout(tiny("llama"), ["re:.*"])


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.ModuleDict({"layers": nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]), "head": nn.Linear(4, 9)}),
    ],
)
def test_a_model_without_blocks_of_linears_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no repeated blocks"):
        find_layout(model)


def test_a_quantized_linear_is_no_dense_one() -> None:
    """bitsandbytes' and others' layers are subclasses of nn.Linear, and their weight means something else."""

    class Linear4bit(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight.view(torch.uint8).float()[:, ::4], self.bias)

    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Linear4bit(32, 48, bias=False)
    layout = find_layout(model)
    assert not any(name.endswith("up_proj") for name in layout.linears)
    assert layout.describe_left_dense() == "4,608 parameters in Linear4bit"


def test_blocks_with_two_digits_do_not_swallow_each_other() -> None:
    layout = find_layout(tiny("llama", num_hidden_layers=12))
    assert len(layout.linears_of("model.layers.1")) == 7
    found = [name for block in layout.blocks for name in layout.linears_of(block)]
    assert sorted(found) == sorted(layout.linears)


def test_linears_that_are_blocks_themselves_belong_to_their_block() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    layout = find_layout(model)
    assert [list(layout.linears_of(block)) for block in layout.blocks] == [["layers.0"], ["layers.1"]]


def test_the_blocks_are_the_list_with_most_weights_and_not_a_list_inside_it() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})

    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleList([nn.Linear(8, 9)]),
            "decoder": nn.ModuleDict({"h": nn.ModuleList([block(), block()])}),
        }
    )
    assert list(find_blocks(model)) == ["decoder.h.0", "decoder.h.1"]
