"""`optimize_for_inference`: the same model, faster; as it was when it is saved, converted or trained."""

import copy
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig

from integration_tests.inference.compressed_models import (
    IDS,
    TOLERANCES,
    assert_near,
    compressed,
    generated,
    joined,
    logits,
)
from integration_tests.quantization.quantized_models import needs_bnb, needs_gptq, wide
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, convert
from optimum_dobisvd import optimize_for_inference as optimized
from optimum_dobisvd import restore_after_inference as restored
from optimum_dobisvd.encodings.gptq_cpu import GPTQOnCPU
from optimum_dobisvd.inference.by_rows import ByRows
from optimum_dobisvd.inference.groups import shared_inputs
from optimum_dobisvd.inference.measured import SPEEDS, speed_key
from optimum_dobisvd.inference.optimize import restore_after_inference
from optimum_dobisvd.inference.shared_input import SharedInput
from optimum_dobisvd.inference.unfolded import UnfoldedLinear
from optimum_dobisvd.structures.base import CompressedLinear, compressed_linears
from optimum_dobisvd.structures.low_rank import LowRankLinear
from optimum_dobisvd.structures.pivoted import PivotedLinear

FORMATS = [
    *[(structure, encoding) for encoding in ("float", "int8") for structure in ("dense", "low_rank", "pivoted")],
    ("low_rank", "remap"),
    *[
        pytest.param(structure, encoding, marks=needs)
        for encoding, needs in (("gptq4_g32", needs_gptq), ("gptq3_g32", needs_gptq), ("nf4", needs_bnb))
        for structure in ("dense", "low_rank", "pivoted")
    ],
]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("structure", "encoding"), FORMATS)
def test_it_computes_what_it_did_before(structure: str, encoding: str, dtype: torch.dtype) -> None:
    if (structure, encoding) == ("dense", "float"):
        model = compressed("low_rank", "float", dtype, q_proj="dense", k_proj="dense", up_proj="dense")
    else:
        model = compressed(structure, encoding, dtype)
    expected, tokens_before = logits(model), generated(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert optimized(model, dense=[]) is model
    assert_near(logits(model), expected, dtype, encoding)
    one = IDS[:1, :1]
    assert_near(logits(model, one), logits(restored(copy.deepcopy(model)), one), dtype, encoding)
    if dtype is torch.float32:
        assert torch.equal(generated(model), tokens_before)
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    restored(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("structure", "encoding"),
    [("low_rank", "float"), ("pivoted", "int8"), pytest.param("dense", "gptq4_g32", marks=needs_gptq)],
)
def test_what_reads_one_input_is_one_product(structure: str, encoding: str) -> None:
    model = compressed(structure, encoding)
    parameters = {name: tensor.shape for name, tensor in model.named_parameters()}
    optimized(model, dense=[])
    assert joined(model) == 2 * 2  # q, k and v; gate and up; of two blocks
    assert {name: tensor.shape for name, tensor in model.named_parameters()} == parameters


def test_dense_linears_are_joined_with_each_other_beside_factorized_ones() -> None:
    model = compressed("low_rank", "int8", q_proj="dense")  # in 8 bits, too: one product with the first of k and v
    optimized(model, dense=[])
    shared = model.model.layers[0].self_attn.k_proj.first.shared
    assert shared is model.model.layers[0].self_attn.q_proj.linear.shared
    mixed = compressed("low_rank", "float", q_proj="dense")
    optimized(mixed, dense=[])
    assert mixed.model.layers[0].self_attn.q_proj.shared is mixed.model.layers[0].self_attn.v_proj.first.shared


def test_weights_are_held_once() -> None:
    model = optimized(compressed("low_rank", "float"), dense=[])
    attention = model.model.layers[0].self_attn
    storages = {part.first.weight.untyped_storage().data_ptr() for part in (attention.q_proj, attention.k_proj)}
    assert len(storages) == 1
    moved = model.to(torch.bfloat16)
    storages = {part.first.weight.untyped_storage().data_ptr() for part in (attention.q_proj, attention.k_proj)}
    assert len(storages) == 1
    again = compressed("low_rank", "float").to(torch.bfloat16)
    assert_near(logits(moved), logits(again), torch.bfloat16)


class Reader(nn.Module):
    """Calls its linears on inputs of its own choice."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=12))
def test_the_order_of_calls_does_not_matter(calls: list[tuple[int, int]]) -> None:
    from optimum_dobisvd.encodings.float import Float
    from optimum_dobisvd.inference.shared_input import SharedInputPart

    linears = [nn.Linear(4, rows, bias=rows == 3) for rows in (2, 3, 4)]
    inputs = [torch.randn(5, 4), torch.randn(5, 4)]
    with torch.no_grad():
        expected = [[linear(x) for x in inputs] for linear in linears]
        whole = Float().for_inference(linears, torch.float32)
        assert whole is not None
        shared = SharedInput(whole, linears)
        parts = [SharedInputPart(linear, shared, index) for index, linear in enumerate(linears)]
        for which, given_input in calls:
            torch.testing.assert_close(parts[which](inputs[given_input]), expected[which][given_input])


def test_a_tensor_that_is_changed_in_place_is_another_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            early = self.q(x) + self.k(x)
            return early + self.v(x.mul_(2))

    model = Block()
    found = shared_inputs(model, dict(model.named_children()), {"x": torch.randn(3, 4)})
    assert found == [["q", "k"]]


def test_gradients_of_weights_are_right() -> None:
    """Outside of `no_grad`, each linear computes by itself: the joined weight takes no gradient."""
    model = compressed("low_rank", "float")
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(input_ids=IDS).logits.square().mean().backward()
        return model.get_parameter("model.layers.0.self_attn.k_proj.first.weight").grad.clone()

    before = gradient()
    optimized(model, dense=[])
    torch.testing.assert_close(gradient(), before)


def test_a_model_in_training_mode_is_refused() -> None:
    model = compressed("low_rank", "float")
    model.model.layers[1].train()
    with pytest.raises(ValueError, match=r"model\.layers\.1 of LlamaForCausalLM is in training mode.*model\.eval\(\)"):
        optimized(model)
    model.train()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is in training mode.*model\.eval\(\)"):
        optimized(model)
    assert not joined(model)


def test_training_later_is_refused_until_it_is_undone() -> None:
    model = optimized(compressed("low_rank", "float"), dense=[])
    with pytest.raises(ValueError, match=r"optimized for inference.*restore_after_inference"):
        model.train()
    assert not any(module.training for module in model.modules())
    assert model.eval() is model
    restore_after_inference(model).train()
    assert model.model.layers[0].training


def test_adapters_are_refused_in_words() -> None:
    peft = pytest.importorskip("peft")
    model = optimized(compressed("low_rank", "float"), dense=[])
    with pytest.raises(ValueError, match="optimized for inference.*restore_after_inference"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["first"]))
    adapted = peft.get_peft_model(compressed("low_rank", "float"), peft.LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match=r"layer of PEFT.*merge_and_unload"):
        optimized(adapted.base_model.model.eval())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": 0}, "rows=0: give a number above 0"),
        ({"dense": "q_proj"}, r"dense='q_proj': give 'measured', or a list of names, \['q_proj'\]"),
        ({"dense": ["z_proj"]}, "z_proj"),
        ({"inputs": {"input_idx": IDS}}, r"cannot be called.*input_ids.*pass inputs="),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(given: dict[str, Any], message: str) -> None:
    model = compressed("low_rank", "float")
    with pytest.raises(ValueError, match=message):
        optimized(model, **given)
    assert not joined(model)
    assert model.train().training


def test_dense_models_and_a_second_time_are_refused() -> None:
    with pytest.raises(ValueError, match="is not compressed: pass what from_pretrained loads"):
        optimized(tiny("llama"))
    model = optimized(compressed("low_rank", "float"))
    with pytest.raises(ValueError, match=r"has been optimized.*restore_after_inference\(model\) first"):
        optimized(model)


@pytest.mark.parametrize("encoding", ["float", "int8", pytest.param("gptq4_g32", marks=needs_gptq)])
def test_it_is_saved_as_if_it_had_not_been(encoding: str, tmp_path: Any) -> None:
    model = compressed("pivoted", encoding)
    model.save_pretrained(tmp_path / "before")
    optimized(model, dense=["o_proj"])
    expected = logits(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert torch.equal(logits(model), expected)
    assert joined(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32)
    assert_near(logits(optimized(loaded, dense=[])), expected, torch.float32, encoding)


def test_it_can_be_converted_and_dequantized() -> None:
    model = compressed("low_rank", "float")
    expected = logits(model)
    convert(optimized(model), "int8")
    assert {module.encoding for module in compressed_linears(model).values()} == {"int8"}
    assert model.train().training
    other = optimized(compressed("pivoted", "float")).dequantize()
    assert not compressed_linears(other)
    assert not joined(other)
    assert logits(other).shape == expected.shape


def test_matrices_can_be_named_that_run_dense() -> None:
    model = compressed("pivoted", "float")
    expected = logits(model)
    optimized(model, dense=["layers.0.mlp.down_proj", "q_proj"])
    running = [type(layer.mlp.down_proj) for layer in model.model.layers]
    assert running[0] is nn.Linear
    assert issubclass(running[1], CompressedLinear)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.shared is attention.k_proj.first.shared  # dense rows beside pivot rows: one product
    assert_near(logits(model), expected, torch.float32)


@pytest.fixture
def speeds() -> Iterator[dict[Any, float]]:
    """Measured speeds, none at first, and after the test as they were."""
    known = dict(SPEEDS)
    SPEEDS.clear()
    yield SPEEDS
    SPEEDS.clear()
    SPEEDS.update(known)


def test_matrices_slower_than_dense_ones_run_dense(speeds: dict[Any, float]) -> None:
    model = compressed("low_rank", "float")
    for name, module in compressed_linears(model).items():
        speeds[speed_key(module, 3)] = 2.0 if name.endswith("o_proj") else 0.5
    optimized(model, rows=3)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.down_proj, CompressedLinear)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_pivoted_matrices_run_as_two_factors_where_those_are_faster(
    dtype: torch.dtype, speeds: dict[Any, float], tmp_path: Any
) -> None:
    model = compressed("pivoted", "float", dtype, wide("qwen2", dtype))  # which has biases
    for name, module in compressed_linears(model).items():
        speeds[speed_key(module, 3)] = 0.6 if name.endswith("o_proj") else 0.8
        speeds[speed_key(module, 3, LowRankLinear)] = 0.6
    model.save_pretrained(tmp_path / "before")
    expected, tensors = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    matrix = model.model.layers[0].mlp.down_proj
    optimized(model, rows=3)
    attention = model.model.layers[0].self_attn
    assert type(model.model.layers[0].mlp.down_proj) is UnfoldedLinear
    assert matrix.second.weight.numel() == 0  # nothing twice
    assert type(attention.o_proj) is PivotedLinear  # as fast, in fewer numbers
    assert attention.q_proj.first.shared is attention.k_proj.first.shared
    assert_near(logits(model), expected, dtype)
    optimized_logits = logits(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert torch.equal(logits(model), optimized_logits)
    restored(model)
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("structure", "many", "dtype"),
    [
        ("pivoted", PivotedLinear, torch.float32),
        ("pivoted", LowRankLinear, torch.bfloat16),
        ("low_rank", LowRankLinear, torch.float32),
    ],
)
def test_few_and_many_rows_may_each_have_their_form(
    structure: str, many: type[CompressedLinear], dtype: torch.dtype, speeds: dict[Any, float], tmp_path: Any
) -> None:
    model = compressed(structure, "float", dtype, wide("qwen2", dtype))
    for name, module in compressed_linears(model).items():
        for kind in {PivotedLinear, LowRankLinear}:
            speeds[speed_key(module, 2, kind)] = 0.5 if name.endswith("down_proj") and kind is many else 2.0
            speeds[speed_key(module, 600, kind)] = 0.5 if kind is many else 2.0
    model.save_pretrained(tmp_path / "before")
    many_ids, few_ids = tokens(2, 300), tokens(2, 1)
    expected = [logits(model, ids) for ids in (few_ids, many_ids)]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimized(model, rows=(2, 600))
    attention = model.model.layers[0].self_attn
    assert type(attention.o_proj.dense) is nn.Linear
    assert isinstance(attention.o_proj.factors, many)
    assert isinstance(model.model.layers[0].mlp.down_proj, many)  # one form for both
    assert attention.q_proj.dense.shared is attention.v_proj.dense.shared
    assert attention.q_proj.factors.first.shared is attention.v_proj.factors.first.shared
    for ids, before in zip((few_ids, many_ids), expected, strict=True):
        assert_near(logits(model, ids), before, dtype)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_near(logits(compiled, few_ids), expected[0], dtype)
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert_near(logits(model, many_ids), expected[1], dtype)
    restored(model)
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_two_factors_for_few_rows_and_a_dense_matrix_for_many(speeds: dict[Any, float]) -> None:
    model = compressed("pivoted", "float")
    expected = logits(model)
    for module in compressed_linears(model).values():
        for rows, unfolded in ((2, 0.5), (600, 3.0)):
            speeds[speed_key(module, rows)], speeds[speed_key(module, rows, LowRankLinear)] = 2.0, unfolded
    optimized(model, rows=(2, 600))
    assert type(model.model.layers[0].mlp.down_proj.factors) is UnfoldedLinear
    assert type(model.model.layers[0].mlp.down_proj.dense) is nn.Linear
    assert_near(logits(model), expected, torch.float32)
    assert_near(logits(model, tokens(2, 300)), logits(restored(copy.deepcopy(model)), tokens(2, 300)), torch.float32)


def test_two_forms_of_a_pivoted_matrix_are_not_held_beside_each_other(speeds: dict[Any, float]) -> None:
    model = compressed("pivoted", "float")
    for module in compressed_linears(model).values():
        for rows, own, unfolded in ((2, 0.5, 0.7), (600, 0.9, 0.5)):
            speeds[speed_key(module, rows)], speeds[speed_key(module, rows, LowRankLinear)] = own, unfolded
    optimized(model, rows=(2, 600))
    assert {type(module) for module in compressed_linears(model).values()} == {UnfoldedLinear}


class _Called(nn.Linear):
    """Writes down how many rows it was called with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows = x.numel() // x.shape[-1]
        return super().forward(x)


@given(st.dictionaries(st.integers(1, 10_000), st.booleans(), min_size=1, max_size=5), st.integers(1, 20_000))
def test_a_number_of_rows_is_computed_as_the_nearest_that_is_known(runs_dense: dict[int, bool], rows: int) -> None:
    forms = ByRows(nn.Identity(), nn.Identity(), runs_dense)
    nearest = min(runs_dense, key=lambda known: (max(Fraction(known, rows), Fraction(rows, known)), known))
    assert (forms.form(rows) == "dense") is runs_dense[nearest]


@pytest.mark.parametrize("shape", [(1, 1), (34,), (2, 17), (35,), (5, 7), (0,)])
def test_the_form_is_that_of_all_rows_of_a_product(shape: tuple[int, ...]) -> None:
    forms = ByRows(_Called(4, 3), _Called(4, 3), {2: False, 600: True}).eval()
    forms(torch.zeros(*shape, 4))
    rows = math.prod(shape)
    called, other = (forms.factors, forms.dense) if rows <= 34 else (forms.dense, forms.factors)
    assert called.rows == rows
    assert not hasattr(other, "rows")


def test_a_copy_of_unfolded_matrices_has_its_own_values(speeds: dict[Any, float]) -> None:
    model = compressed("pivoted", "float", torch.bfloat16)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in compressed_linears(model).values():
        speeds[speed_key(module, 3)], speeds[speed_key(module, 3, LowRankLinear)] = 0.8, 0.6
    expected = logits(optimized(model, rows=3))
    copied = restored(copy.deepcopy(model))
    assert torch.equal(logits(model), expected)  # is none the wiser
    found = restored(model).state_dict()
    for name, tensor in copied.state_dict().items():
        assert torch.equal(found[name], tensors[name])
        assert torch.equal(tensor, tensors[name])


def test_what_stands_in_for_a_matrix_says_so_to_peft(speeds: dict[Any, float]) -> None:
    model = compressed("pivoted", "float")
    for name, module in compressed_linears(model).items():
        for rows, unfolded in ((2, 0.5), (600, 3.0 if name.endswith("down_proj") else 0.5)):
            speeds[speed_key(module, rows)], speeds[speed_key(module, rows, LowRankLinear)] = 2.0, unfolded
    layer = optimized(model, rows=(2, 600)).model.layers[0]
    for stand_in, kind in ((layer.self_attn.q_proj, UnfoldedLinear), (layer.mlp.down_proj, ByRows)):
        assert type(stand_in) is kind
        assert "call optimum_dobisvd.restore_after_inference(model) first" in f"{stand_in}"


def test_a_matrix_with_a_hook_stays_in_its_place(speeds: dict[Any, float]) -> None:
    model = compressed("pivoted", "float")
    for module in compressed_linears(model).values():
        speeds[speed_key(module, 3)], speeds[speed_key(module, 3, LowRankLinear)] = 2.0, 3.0
    called: list[nn.Module] = []
    watched = model.model.layers[0].mlp.down_proj
    watched.register_forward_hook(lambda module, *_: called.append(module))
    optimized(model, rows=3)
    logits(model)
    assert called[-1:] == [watched]
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear


def test_speeds_are_measured_once(speeds: dict[Any, float]) -> None:
    model = optimized(compressed("pivoted", "float"), rows=(1, 7))
    first = dict(speeds)
    assert {key[0] for key in first} == {"pivoted", "low_rank"}
    assert {key[5] for key in first} == {1, 7}
    assert all(ratio > 0 for ratio in first.values())
    optimized(restored(model), rows=(1, 7))
    assert first == speeds


def test_shapes_that_differ_little_are_measured_as_one() -> None:
    def key(rank: int, rows: int) -> tuple[Any, ...]:
        return speed_key(PivotedLinear(4096, 4096, rank, device="meta"), rows)

    assert key(1220, 1) == key(1279, 1) != key(1411, 1)
    assert key(1203, 1) != key(1203, 2)
    assert key(1203, 4096) == key(1203, 8192) != key(1203, 512)
    small = PivotedLinear(30, 28, 27, device="meta")  # no rank beyond the matrix's, nor none at all
    assert speed_key(small, 1)[4] == 27
    assert speed_key(PivotedLinear(24, 20, 3, device="meta"), 1)[4] == 3


@needs_gptq
def test_gptq_runs_in_a_kernel_that_reads_four_bits() -> None:
    model = optimized(compressed("low_rank", "gptq4_g32", torch.bfloat16), dense=[])
    second = model.model.layers[0].mlp.down_proj.second
    assert isinstance(second, GPTQOnCPU)
    assert second.packed is not None
    assert second.packed.nbytes == second.in_features * second.out_features // 2


@pytest.mark.parametrize(
    ("structure", "encoding", "dtype"),
    [
        ("pivoted", "float", torch.float32),
        ("pivoted", "int8", torch.bfloat16),
        ("low_rank", "remap", torch.bfloat16),
        pytest.param("pivoted", "gptq4_g32", torch.bfloat16, marks=needs_gptq),
        pytest.param("dense", "gptq4_g32", torch.float32, marks=needs_gptq),
    ],
)
def test_it_compiles_as_one_graph(structure: str, encoding: str, dtype: torch.dtype) -> None:
    model = compressed(structure, encoding, dtype)
    inputs = [IDS[:1, :1], IDS]  # one row, whose slices lie anywhere in a buffer; and many
    expected = [logits(model, ids) for ids in inputs]
    optimized(model, dense=[])
    for ids, wanted in zip(inputs, expected, strict=True):
        torch._dynamo.reset()
        forward = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(2):
            with torch.no_grad():
                found = forward(input_ids=ids, use_cache=False).logits.float()
            assert_near(found, wanted, dtype, encoding)
    torch._dynamo.reset()


@pytest.mark.parametrize("structure", ["low_rank", "pivoted"])
def test_generate_with_a_static_cache_gives_the_same_tokens(structure: str) -> None:
    model = compressed(structure, "float")
    expected = generated(model)
    optimized(model, dense=[])
    compiled = CompileConfig(fullgraph=True, mode="reduce-overhead")
    compiled._compile_all_devices = True  # transformers compiles on GPUs alone unless it is told so
    found = generated(model, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "phi", "deepseek_v3"])
def test_other_architectures(name: str) -> None:
    model = tiny(name)
    config = DobiSVDConfig(method="output_pca", ratio=0.7, dataset=tokens(6, 24), structure="low_rank")
    model = DobiSVDQuantizer(config).quantize_model(model)
    expected = logits(model)
    optimized(model, dense=[])
    assert_near(logits(model), expected, torch.float32)
    experts = [module for each, module in model.named_modules() if each.endswith(".w1") or each.endswith("gate_proj")]
    assert name != "mixtral" or all(hasattr(module.first, "shared") for module in experts if hasattr(module, "first"))
    assert torch.equal(logits(restored(model)), expected)
