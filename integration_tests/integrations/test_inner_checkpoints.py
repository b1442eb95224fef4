"""Low rank with GPTQ or bitsandbytes on top: bit for bit in a new process, bytes as planned, refusals in words."""

import importlib.util
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig

from integration_tests.integrations.test_round_trip import assert_reloaded_alike, logits
from integration_tests.processes import run_python
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.model.layout import checkpoint_bytes, find_layout
from optimum_dobisvd.checkpoint.hf_quantizer import stack_inner
from optimum_dobisvd.nn.compressed_linear import CompressedLinear, matrix_of
from optimum_dobisvd.nn.low_rank_linear import LowRankLinear
from optimum_dobisvd.pipeline.allocate import make_plan
from optimum_dobisvd.report.report import resident_bytes
from optimum_dobisvd.storage.inner_forms import inner_form_named
from optimum_dobisvd.storage.rounding import rounded

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 2}
needs_gptq = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)

INNER = {
    "gptq": lambda: GPTQConfig(bits=4, group_size=32),
    "gptq_desc_act": lambda: GPTQConfig(bits=4, group_size=32, desc_act=True, true_sequential=False),
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4_dq": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "llm_int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
}
# What matrices become by turns: in forms of the inner quantizer and in our own.
FORMS = {
    "gptq": [("gptq4_g32", 32), ("gptq4_g32", None), ("gptq3_g32", 32), ("gptq2_g32", None), ("int8", 16)],
    "gptq_desc_act": [("gptq8_g32", 32), ("gptq4_g32", None), ("plain", 7)],
    "nf4": [("nf4", 64), ("nf4", None), ("plain", 9), ("dense_int8", None)],
    "nf4_dq": [("nf4_dq", 64), ("nf4_dq", None), ("dense", None)],
    "fp4": [("fp4", 64), ("fp4", None)],
    "llm_int8": [("llm_int8", 17), ("llm_int8", None), ("int8", 16)],
}


def wide(name, dtype=torch.float32):
    return tiny(name, dtype=dtype, **WIDE)


def planned(model, forms):
    modules = {
        target.name: PlannedModule(None if rank is None else min(rank, target.out_features), storage)
        for target, (storage, rank) in zip(find_layout(model).targets, forms * 99, strict=False)
    }
    return Plan(modules, method="output_pca", ratio=None, allocation="by hand")


def stacked(folder, key, dtype, **placement):
    """The dense model in a folder, compressed and quantized in one `from_pretrained`."""
    plan = planned(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), FORMS[key])
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan, inner=INNER[key]())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, **placement)


def matrix_bytes(folder):
    """Bytes in the files of all tensors of the blocks' linears but their biases."""
    total = 0
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if "_proj." in key and not key.endswith("bias"):
                total += file.get_tensor(key).nbytes
    return total


@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=needs_gptq if key.startswith("gptq") else needs_bnb) for key in INNER],
)
def test_every_form_reloads_bit_for_bit_in_a_new_process_and_weighs_what_the_report_says(key, tmp_path):
    expected = {}
    for name in ("llama", "qwen2"):
        wide(name).save_pretrained(tmp_path / name)
        for dtype in (torch.float32, torch.bfloat16):
            model = stacked(tmp_path / name, key, dtype)
            path = tmp_path / f"{name}-{str(dtype)[6:]}"
            before = logits(model)
            model.save_pretrained(path)
            assert torch.equal(logits(model), before)
            expected[path.name] = before
            spare = 30 if key == "nf4_dq" else 0  # the offset is written with up to 24 characters
            counted = len([m for m in model.dobisvd_plan.modules.values() if m.storage == "nf4_dq"]) * 2 * spare
            assert 0 <= model.dobisvd_report.target_bytes - matrix_bytes(path) <= counted
            storages = {entry["storage"] for entry in model.config.quantization_config.modules.values()}
            assert storages == {storage for storage, _ in FORMS[key] if storage != "dense"}
    assert_reloaded_alike(tmp_path, expected)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("gptq", marks=needs_gptq),
        *(pytest.param(k, marks=needs_bnb) for k in ("nf4", "nf4_dq", "llm_int8")),
    ],
)
def test_a_model_reloaded_and_saved_again_is_the_same_files(key, tmp_path):
    wide("qwen2").save_pretrained(tmp_path / "dense")
    stacked(tmp_path / "dense", key, torch.bfloat16).save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    again(input_ids=tokens(2, 9))
    again.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@needs_bnb
@pytest.mark.parametrize("key", ["nf4", "nf4_dq", "llm_int8"])
def test_memory_counts_the_scales_that_hang_on_parameters(key, tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    stacked(tmp_path / "dense", key, torch.bfloat16).save_pretrained(tmp_path / "out")
    described = ("bitsandbytes__nf4", "quant_map", "weight_format")  # not held, or one table for all
    files = load_file(tmp_path / "out" / "model.safetensors")
    held = sum(tensor.nbytes for name, tensor in files.items() if not name.endswith(described))
    assert held <= resident_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) < 1.1 * held


@needs_gptq
def test_tensors_that_a_kernel_has_repacked_are_not_saved(tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    plan = planned(wide("llama"), [("gptq4_g32", 32), ("gptq4_g32", None)])
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan, inner=INNER["gptq"]())
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "out")
    again = AutoConfig.from_pretrained(tmp_path / "out")
    again.quantization_config["inner"]["backend"] = "gptq_torch_aten"  # the fused kernel for CPUs
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", config=again, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.allclose(logits(model).float(), logits(ours).float(), atol=0.5, rtol=0.1)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="has repacked its tensors; load the model without backend"):
        model.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@needs_gptq
def test_checkpoints_in_the_format_of_auto_gptq_are_read(tmp_path):
    """It stores zero points less one; everything else is the same. Saved again, they are in the present format."""
    wide("llama").save_pretrained(tmp_path / "dense")
    plan = planned(wide("llama"), [("gptq4_g32", 32), ("gptq2_g32", None), ("gptq8_g32", None)])
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan, inner=INNER["gptq"]())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "old")
    ones = {"4": 0x11111111, "2": 0x55555555, "8": 0x01010101}
    path = tmp_path / "old" / "model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        if key.endswith("qzeros"):
            name = key.rsplit(".", 2)[0]
            tensors[key] -= ones[plan.modules[name].storage[4]]
    save_file(tensors, path, metadata={"format": "pt"})
    edited = json.loads((tmp_path / "old" / "config.json").read_text())
    edited["quantization_config"]["inner"] |= {"format": "gptq", "checkpoint_format": "gptq"}
    (tmp_path / "old" / "config.json").write_text(json.dumps(edited))
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert torch.equal(logits(old), logits(model))
    old.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new")), logits(model))


@pytest.mark.parametrize("key", [pytest.param("gptq", marks=needs_gptq), pytest.param("nf4", marks=needs_bnb)])
def test_a_saved_low_rank_model_is_quantized_at_load(key, tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    config = DobiSVDConfig(method="output_pca", ratio=0.8, dataset=tokens(6, 24), nsamples=6, seqlen=24)
    low_rank = DobiSVDQuantizer(config).quantize_model(dense)
    low_rank.save_pretrained(tmp_path / "low-rank")
    again = AutoConfig.from_pretrained(tmp_path / "low-rank")
    inner = INNER[key]()
    again.quantization_config["inner"] = inner.to_dict()
    if key == "gptq":
        again.quantization_config["dataset"] = tokens(6, 24)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "low-rank", config=again)
    multiple = 32 if key == "gptq" else 64
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            plain = low_rank.get_submodule(name)
            assert module.rank == math.ceil(plain.rank / multiple) * multiple
            lost = (module.dense_matrix() - plain.dense_matrix()).norm() / plain.dense_matrix().norm()
            assert lost < 0.25, "the same matrix, rounded to 4 bits"
    assert all(m.storage != "plain" for m in model.modules() if isinstance(m, CompressedLinear))
    model.save_pretrained(tmp_path / "stacked")
    assert_reloaded_alike(tmp_path, {"stacked": logits(model)})
    stored = json.loads((tmp_path / "stacked" / "config.json").read_text())["quantization_config"]
    assert "dataset" not in stored["inner"]
    assert "tokenizer" not in stored["inner"]


@pytest.mark.parametrize("key", [pytest.param("gptq", marks=needs_gptq), pytest.param("nf4", marks=needs_bnb)])
def test_an_inner_that_no_matrix_took_is_told_and_forgotten(key, tmp_path, caplog):
    """It would be taken for one that is still to come, and quantize the checkpoint at every load."""
    config = DobiSVDConfig(method="output_pca", ratio=0.9, dataset=tokens(6, 24), inner=INNER[key]())
    model = DobiSVDQuantizer(config).quantize_model(wide("llama"))
    assert "no matrix is quantized by inner: at this size there is room for better (dense" in caplog.text
    model.save_pretrained(tmp_path / "out")
    assert "inner" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert_reloaded_alike(tmp_path, {"out": logits(model)})


@needs_bnb
def test_ranks_beyond_the_matrix_become_whole_matrices(tmp_path):
    """Keys and values of one head have 32 outputs, and nf4 takes ranks of 64."""
    model = tiny("llama", **{**WIDE, "num_key_value_heads": 1})
    low_rank = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.6)).quantize_model(model)
    before = {n: m.dense_matrix() for n, m in low_rank.named_modules() if isinstance(m, LowRankLinear)}
    keys = [name for name in before if "k_proj" in name or "v_proj" in name]
    assert keys
    stack_inner(low_rank, INNER["nf4"](), None)
    for name, matrix in before.items():
        shell = low_rank.get_submodule(name)
        assert shell.rank in ((None,) if name in keys else (None, 64)), name
        assert float((shell.dense_matrix() - matrix).norm()) < 0.25 * float(matrix.norm())
        if shell.rank is not None:
            whole = inner_form_named("nf4").bytes_of(shell.out_features, shell.in_features, 4)
            assert sum(tensor.nbytes for tensor in shell.state_dict().values()) < whole
    assert any(low_rank.get_submodule(name).rank for name in before), "others stay factors"
    low_rank.save_pretrained(tmp_path / "out")
    assert_reloaded_alike(tmp_path, {"out": logits(low_rank)})


@needs_bnb
def test_what_was_to_stay_dense_is_not_quantized_afterwards():
    kept = "model.layers.0.self_attn.q_proj"
    config = DobiSVDConfig(method="svd", ratio=0.8, overrides={kept: {"dense": True}})
    model = DobiSVDQuantizer(config).quantize_model(wide("llama"))
    weight = model.get_submodule(kept).weight.clone()
    stack_inner(model, INNER["nf4"](), None)
    assert type(model.get_submodule(kept)) is torch.nn.Linear
    assert torch.equal(model.get_submodule(kept).weight, weight)
    assert all(m.storage == "nf4" for m in model.modules() if isinstance(m, CompressedLinear))


@needs_bnb
@pytest.mark.parametrize(
    ("overrides", "stays"),
    [
        ({"re:.*q_proj": {"dense": True}, "layers.0": {"ratio": 0.5}}, False),
        ({"layers.0": {"ratio": 0.5}, "re:.*q_proj": {"dense": True}}, True),
        ({"model.layers.0.self_attn.q_proj": {"dense": True}, "layers.0": {"ratio": 0.5}}, True),
    ],
)
def test_of_overrides_the_later_and_the_full_name_count_afterwards_too(overrides, stays):
    kept = "model.layers.0.self_attn.q_proj"
    plan = planned(wide("llama"), [("dense", None), ("plain", 9)])  # an override of a given plan decides nothing
    config = DobiSVDConfig(method="svd", plan=plan, overrides={"down_proj": {"dense": True}, **overrides})
    for base in (False, True):
        model = DobiSVDQuantizer(config).quantize_model(wide("llama"))
        inside = model.model if base else model
        inside.config = model.config
        stack_inner(inside, INNER["nf4"](), None)
        assert (type(model.get_submodule(kept)) is torch.nn.Linear) == stays


@needs_bnb
def test_errors_of_what_another_library_rounds_are_not_made_up(tmp_path):
    wide("llama").save_pretrained(tmp_path / "dense")
    report = stacked(tmp_path / "dense", "nf4", torch.float32).dobisvd_report
    assert {module.storage for module in report.modules} == {"nf4", "plain", "dense_int8"}
    for module in report.modules:
        assert (module.error is None) == (module.storage == "nf4"), module


@needs_bnb
def test_an_adapter_names_the_quantized_checkpoint_and_not_the_one_before(tmp_path):
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.8)).quantize_model(wide("llama"))
    model.save_pretrained(tmp_path / "low")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    stack_inner(again, INNER["nf4"](), None).save_pretrained(tmp_path / "nf4")
    assert again.name_or_path == str(tmp_path / "nf4")
    assert not (tmp_path / "nf4" / "dobisvd_plan.json").exists()
    stack_inner(model, INNER["nf4"](), None).save_pretrained(tmp_path / "too")
    assert model.name_or_path == str(tmp_path / "too")
    assert not (tmp_path / "too" / "dobisvd_plan.json").exists(), "the plan of the model before"


@needs_gptq
def test_windows_that_ranks_are_judged_on_are_not_rounded_on():
    config = DobiSVDConfig(
        ratio=0.16,
        allocation="dobi_fixed_basis",
        training={"steps": 1, "windows": 1, "held_out": 2},
        dataset=tokens(8, 24),
        inner=INNER["gptq"](),
    )
    quantizer = DobiSVDQuantizer(config)
    quantizer.quantize_model(wide("llama"))
    assert len(quantizer._inner_windows.input_ids) == 6


@needs_gptq
def test_a_second_model_is_rounded_on_its_own_text():
    one, other = tokens(6, 24), tokens(6, 24).flip(0, 1)
    quantizer = DobiSVDQuantizer(
        DobiSVDConfig(method="svd", ratio=0.2, dataset=one, nsamples=6, seqlen=24, inner=INNER["gptq"]())
    )
    quantizer.quantize_model(wide("llama"))
    quantizer.config.dataset = other
    quantizer.quantize_model(wide("llama"))
    assert torch.equal(quantizer._inner_windows.input_ids.sort(0)[0], other.sort(0)[0])


@needs_bnb
def test_it_loads_without_the_package(tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = stacked(tmp_path / "dense", "nf4", torch.bfloat16)
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    code = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(2, 26).view(2, 12)).logits.contiguous()}, sys.argv[2])
"""
    done = run_python(code, str(tmp_path / "out"), str(tmp_path / "logits"), without_package_in=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(load_file(tmp_path / "logits")["logits"], expected)


@needs_bnb
def test_error_feedback_keeps_outputs_closer_than_rounding_each_value(tmp_path):
    from optimum_dobisvd.integrations.inner_bnb import BnbRounder, quantized_alike

    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 48, bias=False)
    inputs = torch.randn(1000, 128) @ torch.randn(128, 128)
    gram = (inputs.T @ inputs).double()
    for nested in (False, True):
        inner = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
        rounder = BnbRounder(inner)
        new, stands_for = rounder.round(linear, gram, "nf4")
        alone = quantized_alike(linear, inner, rounder._operation)
        assert torch.allclose(matrix_of(new).double(), stands_for, atol=1e-6)
        lost = [float(((matrix_of(each) - linear.weight) @ inputs.T).norm()) for each in (new, alone)]
        assert lost[0] < 0.8 * lost[1]


@needs_gptq
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_rounds_to_what_its_kernel_computes_and_beats_the_nearest_values(bits):
    from optimum_dobisvd.integrations.inner_gptq import GPTQRounder

    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64)
    inputs = torch.randn(1000, 128) @ torch.randn(128, 128)
    gram = (inputs.T @ inputs).double()
    form = f"gptq{bits}_g32"
    for options in ({}, {"desc_act": True}, {"sym": False}):
        kernel, stands_for = GPTQRounder(GPTQConfig(bits=bits, group_size=32, **options)).round(linear, gram, form)
        assert torch.allclose(matrix_of(kernel), stands_for, atol=2e-3)
        assert torch.equal(kernel.bias.float(), linear.bias.half().float())
        errors = [each - linear.weight.detach() for each in (stands_for, rounded(linear.weight.detach(), form))]
        lost = [float((error @ inputs.T).norm()) for error in errors]
        assert lost[0] < lost[1]


@needs_bnb
def test_ranks_are_alike_before_they_are_rounded(tmp_path):
    """Without the rotation everything else works as well, and perplexity is far worse."""
    dense = wide("llama")
    for name, parameter in dense.named_parameters():
        if "_proj" in name:
            left, values, right = torch.linalg.svd(parameter.data, full_matrices=False)
            parameter.data = left * torch.logspace(0, -3, len(values)) @ right
    dense.save_pretrained(tmp_path / "dense")

    def spreads(model):
        sizes = [matrix_of(m.first).norm(dim=1) for m in model.modules() if isinstance(m, LowRankLinear)]
        assert sizes
        return [float(each.max() / each.min()) for each in sizes]

    def compressed(form, inner):
        plan = planned(dense, [(form, 64 if inner else 40)])
        config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan, inner=inner)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)

    plain = compressed("plain", None)
    assert max(spreads(plain)) > 6
    assert max(spreads(compressed("nf4", INNER["nf4"]()))) < 3
    plain.save_pretrained(tmp_path / "plain")
    again = AutoConfig.from_pretrained(tmp_path / "plain")
    again.quantization_config["inner"] = INNER["nf4"]().to_dict()
    assert max(spreads(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", config=again))) < 3


@needs_gptq
def test_the_budget_counts_the_inner_bits_and_ranks_suit_the_kernels():
    model = wide("llama", torch.bfloat16)
    for ratio in (0.18, 0.25):
        config = DobiSVDConfig(
            method="output_pca", ratio=ratio, dataset=tokens(6, 24), inner=GPTQConfig(bits=4, group_size=32)
        )
        layout, _, _ = DobiSVDQuantizer(config).prepare(model)
        plan = make_plan(config, layout, None)
        assert plan.ratio_of(layout.targets) <= ratio
        assert any(entry.rank is not None for entry in plan.modules.values())
        assert all(entry.rank is None or entry.rank % 32 == 0 for entry in plan.modules.values())


@needs_gptq
@pytest.mark.parametrize("tied", ["llama", "llama_tied"])
def test_a_size_asked_for_is_the_size_of_the_checkpoint(tied, tmp_path):
    model = wide(tied, torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    whole = checkpoint_bytes(model)
    asked = int(0.72 * whole)
    config = DobiSVDConfig(
        budget=asked, dataset=tokens(8, 24), storage="mixed", inner=GPTQConfig(bits=4, group_size=32)
    )
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert 0.97 * asked < checkpoint_bytes(small) <= asked
    small.save_pretrained(tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == checkpoint_bytes(small)


@needs_bnb
@pytest.mark.parametrize("name", ["qwen2", "opt", "gpt2"])
def test_biases_stay_in_16_bits_and_in_the_size_asked_for(name, tmp_path):
    """bitsandbytes casts them in every pass to the dtype it computes in, by default float32."""
    sizes = {"opt": {"ffn_dim": 256, "word_embed_proj_dim": 128}, "gpt2": {"n_embd": 128}}
    sizes = {"hidden_size": 128, **sizes[name]} if name == "opt" else sizes.get(name, WIDE)
    model = tiny(name, dtype=torch.bfloat16, **sizes)
    model.save_pretrained(tmp_path / "dense")
    asked = checkpoint_bytes(model) - int(0.6 * sum(t.dense_bytes for t in find_layout(model).targets))
    config = DobiSVDConfig(
        budget=asked, dataset=tokens(8, 24), nsamples=8, seqlen=24, storage="mixed", inner=INNER["nf4"]()
    )
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16)
    assert "nf4" in small.config.quantization_config.inner_forms
    logits(small)
    small.save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) <= asked
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    logits(again)
    again.save_pretrained(tmp_path / "two")
    biases = {key: tensor for key, tensor in tensors.items() if key.endswith("bias")}
    assert {tensor.dtype for tensor in biases.values()} == {torch.bfloat16}
    after = load_file(tmp_path / "two" / "model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(after[key].dtype == tensors[key].dtype for key in tensors)
    assert all(torch.equal(after[key], tensors[key]) for key in tensors)


@needs_bnb
def test_dequantizing_gives_a_dense_model_of_the_same_function(tmp_path):
    wide("qwen2").save_pretrained(tmp_path / "dense")
    model = stacked(tmp_path / "dense", "nf4", torch.float32)
    expected = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, CompressedLinear) for module in dense.modules())
    assert torch.allclose(logits(dense), expected, atol=1e-4)
    dense.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(dense))


@needs_bnb
@pytest.mark.parametrize("key", ["nf4", "nf4_dq", "fp4"])
def test_scales_that_bitsandbytes_is_given_are_the_fitted_ones(key):
    """They lose clearly less than its own, and its tensors stand for the matrix that was returned."""
    from optimum_dobisvd.encodings.error_feedback import ErrorFeedback
    from optimum_dobisvd.integrations.inner_bnb import BnbRounder, quantized_alike

    rounder = BnbRounder(INNER[key]())
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(128, 96, bias=False)
    linear.weight.data = torch.randn(96, 128, generator=generator)
    inputs = (
        torch.randn(500, 128, generator=generator)
        * torch.logspace(-1.5, 0.5, 128)[torch.randperm(128, generator=generator)]
    )
    gram = (inputs.T @ inputs).double()
    new, matrix = rounder.round(linear, gram, key)
    plain = INNER["nf4" if key == "nf4_dq" else key]()
    state = quantized_alike(linear, plain, BnbRounder(plain)._operation).weight.quant_state
    own = ErrorFeedback(gram).round(linear.weight.data, state.code.double().sort()[0], state.absmax.view(96, -1))[1]

    def lost(stands_for):
        error = stands_for.double() - linear.weight.data.double()
        return float(((error @ gram) * error).sum())

    assert lost(matrix) < 0.95 * lost(own)
    with torch.no_grad():
        assert torch.allclose(new(torch.eye(128)).T.double(), matrix, atol=1e-5)
