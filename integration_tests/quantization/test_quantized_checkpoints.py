"""Low rank stored by GPTQ or bitsandbytes: bit for bit in a new process, bytes as planned, afterwards as at once."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import optimum_dobisvd.quantizer as quantizer_module
from integration_tests.checkpoint.reloading import assert_reloaded_alike, logits
from integration_tests.fresh_processes import run_python
from integration_tests.quantization.quantized_models import (
    SETTINGS,
    WIDE,
    encodings_of,
    marked,
    needs_bnb,
    needs_gptq,
    planned,
    quantized,
    wide,
)
from integration_tests.statistics.tiny_model_statistics import inputs_by_linear
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, LowRankLinear, convert
from optimum_dobisvd.encodings.base import LinearShape
from optimum_dobisvd.encodings.registry import encoding_named
from optimum_dobisvd.model.footprint import checkpoint_bytes, resident_bytes
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.pipeline.allocate import allocate
from optimum_dobisvd.structures.base import CompressedLinear, compressed_linears


def matrix_bytes(folder):
    """Bytes in the files of all tensors of the blocks' linears but their biases."""
    total = 0
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if "_proj." in key and not key.endswith("bias"):
                total += file.get_tensor(key).nbytes
    return total


@pytest.mark.parametrize("key", marked(*SETTINGS))
def test_every_encoding_reloads_bit_for_bit_in_a_new_process_and_weighs_what_the_report_says(key, tmp_path):
    expected = {}
    for name in ("llama", "qwen2"):
        wide(name).save_pretrained(tmp_path / name)
        for dtype in (torch.float32, torch.bfloat16):
            model = quantized(tmp_path / name, key, dtype)
            path = tmp_path / f"{name}-{str(dtype)[6:]}"
            before = logits(model)
            model.save_pretrained(path)
            assert torch.equal(logits(model), before)
            expected[path.name] = before
            spare = 30 if key == "nf4_dq" else 0  # the offset is written with up to 24 characters
            nested = [module for module in model.dobisvd_plan.modules.values() if module.encoding == "nf4_dq"]
            assert 0 <= model.dobisvd_report.target_bytes - matrix_bytes(path) <= 2 * spare * len(nested)
            entries = model.config.quantization_config.modules.values()
            assert {entry["encoding"] for entry in entries} == encodings_of(key)
            assert {"low_rank", "pivoted"} <= {entry["structure"] for entry in entries}
    assert_reloaded_alike(tmp_path, expected)


@pytest.mark.parametrize("key", marked("gptq", "nf4", "nf4_dq", "llm_int8"))
def test_a_model_reloaded_and_saved_again_is_the_same_files(key, tmp_path):
    wide("qwen2").save_pretrained(tmp_path / "dense")
    quantized(tmp_path / "dense", key, torch.bfloat16).save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    again(input_ids=tokens(2, 9))
    again.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("key", marked("nf4", "nf4_dq", "llm_int8"))
def test_memory_counts_the_scales_that_hang_on_parameters(key, tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantized(tmp_path / "dense", key, torch.bfloat16).save_pretrained(tmp_path / "out")
    described = ("bitsandbytes__nf4", "quant_map", "weight_format")  # not held, or one table for all
    files = load_file(tmp_path / "out" / "model.safetensors")
    held = sum(tensor.nbytes for name, tensor in files.items() if not name.endswith(described))
    assert held <= resident_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) < 1.1 * held


@needs_gptq
def test_tensors_that_a_kernel_has_repacked_are_not_saved(tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    plan = planned(wide("llama"), [("gptq4_g32", 32), ("gptq4_g32", None)])
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan, quantization=SETTINGS["gptq"]())
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "out")
    again = AutoConfig.from_pretrained(tmp_path / "out")
    again.quantization_config["quantization"]["backend"] = "gptq_torch_aten"  # the fused kernel for CPUs
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
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan, quantization=SETTINGS["gptq"]())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "old")
    ones = {"4": 0x11111111, "2": 0x55555555, "8": 0x01010101}
    path = tmp_path / "old" / "model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        if key.endswith("qzeros"):
            name = key.rsplit(".", 2)[0]
            tensors[key] -= ones[plan.modules[name].encoding[4]]
    save_file(tensors, path, metadata={"format": "pt"})
    edited = json.loads((tmp_path / "old" / "config.json").read_text())
    edited["quantization_config"]["quantization"] |= {"format": "gptq", "checkpoint_format": "gptq"}
    (tmp_path / "old" / "config.json").write_text(json.dumps(edited))
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert torch.equal(logits(old), logits(model))
    old.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new")), logits(model))


@pytest.mark.parametrize("key", marked("gptq", "nf4"))
def test_a_saved_compressed_model_is_quantized_at_load(key, tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    multiple, expected = 32 if key == "gptq" else 64, {}
    for structure in ("low_rank", "pivoted"):
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        config = DobiSVDConfig(
            method="output_pca", ratio=0.4, dataset=tokens(6, 24), nsamples=6, seqlen=24, structure=structure
        )
        before = DobiSVDQuantizer(config).quantize_model(dense)
        before.save_pretrained(tmp_path / structure)
        again = AutoConfig.from_pretrained(tmp_path / structure)
        again.quantization_config["quantization"] = SETTINGS[key]().to_dict()
        if key == "gptq":
            again.quantization_config["dataset"] = tokens(6, 24)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / structure, config=again)
        factorized = {name: each for name, each in compressed_linears(model).items() if each.rank is not None}
        assert {module.structure for module in factorized.values()} == {structure}
        for name, module in factorized.items():
            plain = before.get_submodule(name)
            assert module.rank == math.ceil(plain.rank / multiple) * multiple
            lost = (module.dense_matrix() - plain.dense_matrix()).norm() / plain.dense_matrix().norm()
            assert lost < 0.25, "the same matrix, rounded to 4 bits"
        assert all(module.encoding != "float" for module in compressed_linears(model).values())
        model.save_pretrained(tmp_path / f"{structure}-quantized")
        expected[f"{structure}-quantized"] = logits(model)
        stored = json.loads((tmp_path / f"{structure}-quantized" / "config.json").read_text())["quantization_config"]
        assert "dataset" not in stored["quantization"]
        assert "tokenizer" not in stored["quantization"]
    assert_reloaded_alike(tmp_path, expected)


@pytest.mark.parametrize("key", marked("gptq", "nf4"))
def test_an_encoding_that_no_matrix_took_is_warned_of_and_forgotten(key, tmp_path, caplog):
    """It would be taken for one that is still to come, and quantize the checkpoint at every load."""
    config = DobiSVDConfig(method="output_pca", ratio=0.9, dataset=tokens(6, 24), quantization=SETTINGS[key]())
    model = DobiSVDQuantizer(config).quantize_model(wide("llama"))
    name = {"gptq": "gptq4_g32", "nf4": "nf4"}[key]
    assert f"no matrix is quantized to {name}: at this size there is room for better (float" in caplog.text
    model.save_pretrained(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored.get("quantization") is None
    assert_reloaded_alike(tmp_path, {"out": logits(model)})


@needs_bnb
def test_ranks_beyond_the_matrix_become_dense_matrices(tmp_path):
    """Keys and values of one head have 32 outputs, and nf4 takes ranks of 64."""
    model = tiny("llama", **{**WIDE, "num_key_value_heads": 1})
    low_rank = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.6)).quantize_model(model)
    before = {n: m.dense_matrix() for n, m in low_rank.named_modules() if isinstance(m, LowRankLinear)}
    keys = [name for name in before if "k_proj" in name or "v_proj" in name]
    assert keys
    convert(low_rank, SETTINGS["nf4"]())
    for name, matrix in before.items():
        module = low_rank.get_submodule(name)
        assert module.rank in ((None,) if name in keys else (None, 64)), name
        assert float((module.dense_matrix() - matrix).norm()) < 0.25 * float(matrix.norm())
        if module.rank is not None:
            shape = (module.out_features, module.in_features)
            dense_bytes = encoding_named("nf4").bytes(LinearShape(*shape, full_rank=min(shape)), 4)
            assert sum(tensor.nbytes for tensor in module.state_dict().values()) < dense_bytes
    assert any(low_rank.get_submodule(name).rank for name in before), "others stay factors"
    low_rank.save_pretrained(tmp_path / "out")
    assert_reloaded_alike(tmp_path, {"out": logits(low_rank)})


@needs_bnb
def test_what_was_to_stay_dense_is_not_quantized_afterwards():
    kept = "model.layers.0.self_attn.q_proj"
    config = DobiSVDConfig(method="svd", ratio=0.8, overrides={kept: {"dense": True}})
    model = DobiSVDQuantizer(config).quantize_model(wide("llama"))
    weight = model.get_submodule(kept).weight.clone()
    convert(model, SETTINGS["nf4"]())
    assert type(model.get_submodule(kept)) is torch.nn.Linear
    assert torch.equal(model.get_submodule(kept).weight, weight)
    assert all(m.encoding == "nf4" for m in model.modules() if isinstance(m, CompressedLinear))


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
    plan = planned(wide("llama"), [("float", None), ("float", 9)])  # an override of a given plan decides nothing
    config = DobiSVDConfig(method="svd", plan=plan, overrides={"down_proj": {"dense": True}, **overrides})
    for base in (False, True):
        model = DobiSVDQuantizer(config).quantize_model(wide("llama"))
        inside = model.model if base else model
        inside.config = model.config
        convert(inside, SETTINGS["nf4"]())
        assert (type(model.get_submodule(kept)) is torch.nn.Linear) == stays


@needs_bnb
def test_errors_are_those_of_what_is_stored_and_none_where_text_is_rounded_on(tmp_path):
    dense = wide("llama")
    dense.save_pretrained(tmp_path / "dense")
    report = quantized(tmp_path / "dense", "nf4", torch.float32).dobisvd_report
    formats = {(module.structure, module.encoding) for module in report.modules}
    factorized = {(structure, encoding) for structure in ("low_rank", "pivoted") for encoding in ("nf4", "float")}
    assert formats == factorized | {("dense", "nf4"), ("dense", "int8")}
    for module in report.modules:
        assert (module.error is None) == (module.encoding == "nf4"), module
    model = quantized(tmp_path / "dense", "llm_int8", torch.float32)
    inputs = inputs_by_linear(dense, model.dobisvd_plan.modules, tokens(6, 24))
    for module in model.dobisvd_report.modules:
        x, weight = inputs[module.name], dense.get_submodule(module.name).weight.detach().double()
        stored = model.get_submodule(module.name).dense_matrix().double()
        assert module.error == pytest.approx(float(((weight - stored) @ x).norm() / (weight @ x).norm()), rel=1e-3)
        assert module.error > 1e-3


@needs_bnb
def test_an_adapter_names_the_quantized_checkpoint_and_not_the_one_before(tmp_path):
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.8)).quantize_model(wide("llama"))
    model.save_pretrained(tmp_path / "low")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    convert(again, SETTINGS["nf4"]()).save_pretrained(tmp_path / "nf4")
    assert again.name_or_path == str(tmp_path / "nf4")
    assert not (tmp_path / "nf4" / "dobisvd_plan.json").exists()
    convert(model, SETTINGS["nf4"]()).save_pretrained(tmp_path / "too")
    assert model.name_or_path == str(tmp_path / "too")
    assert not (tmp_path / "too" / "dobisvd_plan.json").exists(), "the plan of the model before"


@needs_gptq
def test_windows_that_ranks_are_judged_on_are_not_rounded_on(monkeypatch):
    runner_of = quantizer_module.quantization_runner
    config = DobiSVDConfig(
        ratio=0.16,
        allocation="dobi_fixed_basis",
        training={"steps": 1, "windows": 1, "held_out": 2},
        dataset=tokens(8, 24),
        quantization=SETTINGS["gptq"](),
    )
    quantizer, model = DobiSVDQuantizer(config), wide("llama")
    job = quantizer.prepare(model)
    assert len(job.quantization_windows.input_ids) == 6
    assert len(job.held_out.input_ids) == 2
    seen = []

    def observed(*given):
        runner = runner_of(*given)
        seen.append(sum(len(ids) for ids, _ in runner._batches))
        return runner

    monkeypatch.setattr(quantizer_module, "quantization_runner", observed)
    quantizer.run(model, job)
    assert seen == [6]


@needs_gptq
def test_a_second_model_is_rounded_on_its_own_text():
    one, other = tokens(6, 24), tokens(6, 24).flip(0, 1)
    quantizer = DobiSVDQuantizer(
        DobiSVDConfig(method="svd", ratio=0.2, dataset=one, nsamples=6, seqlen=24, quantization=SETTINGS["gptq"]())
    )
    quantizer.quantize_model(wide("llama"))
    quantizer.config.dataset = other
    model = wide("llama")
    job = quantizer.prepare(model)
    assert torch.equal(job.quantization_windows.input_ids.sort(0)[0], other.sort(0)[0])
    afresh = DobiSVDQuantizer(replace(quantizer.config)).quantize_model(wide("llama"))
    assert torch.equal(logits(quantizer.run(model, job)), logits(afresh))


@needs_bnb
def test_it_loads_without_the_package(tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = quantized(tmp_path / "dense", "nf4", torch.bfloat16)
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


@needs_gptq
def test_the_budget_counts_the_bits_of_the_encoding_and_ranks_suit_the_kernels():
    model = wide("llama", torch.bfloat16)
    for ratio in (0.18, 0.25):
        config = DobiSVDConfig(
            method="output_pca", ratio=ratio, dataset=tokens(6, 24), quantization=SETTINGS["gptq"]()
        )
        job = DobiSVDQuantizer(config).prepare(model)
        plan = allocate(job, None)
        assert plan.ratio_of(job.layout.targets) <= ratio
        assert any(entry.rank is not None for entry in plan.modules.values())
        assert all(entry.rank is None or entry.rank % 32 == 0 for entry in plan.modules.values())


@needs_gptq
@pytest.mark.parametrize("tied", ["llama", "llama_tied"])
def test_a_size_asked_for_is_the_size_of_the_checkpoint(tied, tmp_path):
    model = wide(tied, torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    asked = int(0.72 * checkpoint_bytes(model))
    config = DobiSVDConfig(budget=asked, dataset=tokens(8, 24), mixed=True, quantization=SETTINGS["gptq"]())
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
    asked = checkpoint_bytes(model) - int(0.7 * sum(t.dense_bytes for t in find_layout(model).targets))
    config = DobiSVDConfig(
        budget=asked, dataset=tokens(8, 24), nsamples=8, seqlen=24, mixed=True, quantization=SETTINGS["nf4"]()
    )
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16)
    assert "nf4" in small.config.quantization_config.foreign_encodings
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
    model = quantized(tmp_path / "dense", "nf4", torch.float32)
    expected = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, CompressedLinear) for module in dense.modules())
    assert torch.allclose(logits(dense), expected, atol=1e-4)
    dense.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(dense))
