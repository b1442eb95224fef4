"""PEFT on compressed models, the real library."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from integration_tests.checkpoint.reloading import compressed, logits
from integration_tests.fresh_processes import run_python
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import Plan, adapter_targets
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.structures.base import compressed_linears
from optimum_dobisvd.structures.format import AS_IS

peft = pytest.importorskip("peft", reason="peft is not installed")

FACTORS = ["first", "second"]
MODELS = (
    ("llama", "low_rank"),
    ("llama_tied", "low_rank"),
    ("qwen2", "low_rank"),
    ("gpt2", "low_rank"),
    ("qwen2", "pivoted"),
    ("gpt2", "pivoted"),
)
EIGHT_BIT = ("remap", "int8")

LOAD_ALL = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for path, out, kind in json.loads(sys.argv[1]):
    auto = AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM
    model = auto.from_pretrained(path).eval()
    with torch.no_grad():
        save_file({"logits": model(input_ids=torch.arange(2, 26).view(2, 12)).logits.contiguous()}, out)
"""


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def lora(targets, **settings):
    return peft.LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM", **settings)


def descend(model, steps=6):
    """A few steps on one batch; the losses."""
    ids, losses = tokens(4, 24), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def assert_fresh_process_gives(expected, tmp_path):
    """`expected`: folders, "adapter" or "model", and the logits that a process without our import must give."""
    jobs = [
        (str(path), str(tmp_path / f"{index}.safetensors"), kind) for index, (path, kind, _) in enumerate(expected)
    ]
    done = run_python(LOAD_ALL, json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-3000:]
    for (path, out, _), (_, _, wanted) in zip(jobs, expected, strict=True):
        assert torch.equal(load_file(out)["logits"], wanted), path


def test_lora_on_the_factors_trains_reloads_merges_and_reloads_merged(saved, tmp_path):
    expected = []
    for name, structure in MODELS:
        base = saved(name, structure=structure)
        for targets in (FACTORS, "all-linear"):
            # Pivoted linears have the bias themselves, beside the linears that PEFT wraps.
            model = peft.get_peft_model(load(base), lora(targets, bias="all" if structure == "pivoted" else "none"))
            adapted = {key.rpartition(".")[2] for key, module in model.named_modules() if hasattr(module, "lora_A")}
            assert adapted == {"first", "second"}, "nothing else is in the blocks, and the head is left alone"
            before = logits(model)
            losses = descend(model)
            assert losses[-1] < losses[0] - 0.3, (name, targets, losses)
            healed = logits(model)
            assert not torch.allclose(healed, before, atol=0.1)
            adapter = tmp_path / f"{name}-{structure}-{targets[0]}"
            model.save_pretrained(adapter)
            expected.append((adapter, "adapter", healed))

            merged = model.merge_and_unload()
            assert {module.structure for module in compressed_linears(merged).values()} == {structure}
            assert len(compressed_linears(merged)) > 10
            assert merged.num_parameters() == load(base).num_parameters()
            assert torch.allclose(logits(merged), healed, atol=1e-4)
            merged.save_pretrained(tmp_path / f"{adapter.name}-merged")
            expected.append((tmp_path / f"{adapter.name}-merged", "model", logits(merged)))
    assert_fresh_process_gives(expected, tmp_path)


@pytest.mark.parametrize(("structure", "called"), [("low_rank", "LowRankLinear"), ("pivoted", "PivotedLinear")])
@pytest.mark.parametrize("targets", [["q_proj"], None])
def test_names_of_the_dense_model_are_refused_with_the_names_that_work(saved, targets, structure, called):
    """None is PEFT's own list for this architecture, `q_proj` and `v_proj`."""
    base = saved("llama", structure=structure)
    with pytest.raises(
        ValueError, match=rf"{called}[\s\S]*name what is in it, .*'q_proj.first', 'q_proj.second'.*all-l"
    ):
        peft.get_peft_model(load(base), lora(targets))
    model = peft.get_peft_model(load(base), lora(["q_proj.first", "q_proj.second"]))
    assert sum(hasattr(module, "lora_A") for module in model.modules()) == 6


def test_what_print_shows_has_no_advice_in_it(saved):
    layer = load(saved("llama")).model.layers[0].self_attn.q_proj
    assert str(layer) == repr(layer)
    assert "q_proj" not in str(layer)


@pytest.mark.parametrize("encoding", EIGHT_BIT)
def test_8_bit_linears_refuse_adapters_and_say_what_to_do(saved, encoding):
    for names in (["q_proj", "up_proj", "down_proj", "gate_proj"], [*FACTORS, "linear"]):
        with pytest.raises(ValueError, match=r"stored in 8 bits, which take no adapter: .*convert\(model\)"):
            peft.get_peft_model(load(saved("llama", encoding)), lora(names))


def in_part(folder, encoding, dtype=torch.float32, structure="low_rank"):
    """Layer 1 dense, the others compressed; saved, and loaded again."""
    model = in_formats(
        tiny("llama", dtype=dtype), lambda name: AS_IS.key if "layers.1." in name else (structure, encoding)
    )
    model.save_pretrained(folder)
    return load(folder)


def in_formats(model, format_of):
    """Compressed by hand: `format_of` gives structure and encoding by name. Ranks are 6."""
    modules = {}
    for target in find_layout(model).targets:
        structure, encoding = format_of(target.name)
        modules[target.name] = PlannedModule(structure, encoding, None if structure == "dense" else 6)
    plan = Plan(modules, method="output_pca", ratio=None, allocation="by hand")
    return compressed(model, ratio=0.8, plan=plan)


@pytest.mark.parametrize(
    ("structure", "encoding"),
    [*(("low_rank", encoding) for encoding in ("float", *EIGHT_BIT)), ("pivoted", "float"), ("pivoted", "int8")],
)
def test_adapter_targets_names_what_can_be_adapted(structure, encoding, tmp_path, caplog):
    model = in_part(tmp_path / "mixed", encoding, structure=structure)
    found = adapter_targets(model, ["q_proj", "mlp.up_proj"])
    dense = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert set(dense) <= set(found)
    if encoding == "float":
        assert "model.layers.0.self_attn.q_proj.first" in found
        assert len(found) == 2 + 2 * 4
        assert not caplog.records
    else:
        assert found == dense
        assert "q_proj: 2 of 3 linears are in 8 bits and get no adapter" in caplog.text
    wrapped = peft.get_peft_model(model, lora(adapter_targets(model)))
    every = peft.get_peft_model(load(tmp_path / "mixed"), lora("all-linear"))
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in every.named_parameters()]


def test_adapter_targets_refuses_what_is_not_there(saved, tmp_path):
    model = load(saved("llama"))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no linear called q_prj \(nearest: q_proj\)"):
        adapter_targets(model, ["q_prj"])
    with pytest.raises(TypeError, match=r"pass \['q_proj'\]"):
        adapter_targets(model, "q_proj")
    for encoding in EIGHT_BIT:
        formats = {True: ("dense", "int8"), False: ("low_rank", encoding)}
        eight = in_formats(tiny("llama"), lambda name, formats=formats: formats["mlp" in name])
        with pytest.raises(ValueError, match=r"the model: all 21 linears are stored in 8 bits.*convert\(model\)"):
            adapter_targets(eight)
        with pytest.raises(ValueError, match="o_proj: all 3 linears are stored in 8 bits"):
            adapter_targets(eight, ["o_proj"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoding", EIGHT_BIT)
def test_lora_beside_8_bit_linears(encoding, dtype, tmp_path):
    """Layer 1 learns, and gradients reach it through layer 2 in 8 bits, whose kernels compute in bfloat16."""
    model = peft.get_peft_model(in_part(tmp_path / "base", encoding, dtype), lora("all-linear", bias="all"))
    eight = {name: module.dense_matrix() for name, module in compressed_linears(model).items()}
    assert len(eight) == 14
    losses = descend(model)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(model.get_submodule(name).dense_matrix(), matrix) for name, matrix in eight.items())
    model.save_pretrained(tmp_path / "adapter")
    healed = logits(model)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), healed, atol=1e-4 if dtype == torch.float32 else 0.3)
    merged.save_pretrained(tmp_path / "merged")
    expected = [(tmp_path / "adapter", "adapter", healed), (tmp_path / "merged", "model", logits(merged))]
    assert_fresh_process_gives(expected, tmp_path)


def test_trainable_parameters_are_counted_as_they_are(saved, capsys):
    model = peft.get_peft_model(load(saved("llama")), lora(FACTORS))
    model.print_trainable_parameters()
    plain = sum(parameter.numel() for parameter in load(saved("llama")).parameters())
    learned = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    assert f"trainable params: {learned:,} || all params: {plain + learned:,} " in capsys.readouterr().out


def test_modules_to_save_beside_the_factors(saved, tmp_path):
    """A norm, the head, and entire compressed linears, with a bias of their own and without."""
    expected = []
    for name, structure in (("llama", "low_rank"), ("qwen2", "pivoted")):
        settings = lora(["q_proj.first"], modules_to_save=["lm_head", "norm", "o_proj", "v_proj"])
        model = peft.get_peft_model(load(saved(name, structure=structure)), settings)
        descend(model)
        healed = logits(model)
        model.save_pretrained(tmp_path / f"{name}-adapter")
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / f"{name}-merged")
        assert torch.allclose(logits(merged), healed, atol=1e-4)
        expected.append((tmp_path / f"{name}-adapter", "adapter", healed))
        expected.append((tmp_path / f"{name}-merged", "model", logits(merged)))
    assert_fresh_process_gives(expected, tmp_path)


def test_an_adapter_of_a_model_compressed_in_this_process_knows_its_checkpoint(tmp_path):
    """It named the dense model as the one that it belongs to."""
    tiny("llama").save_pretrained(tmp_path / "dense")
    model = compressed(load(tmp_path / "dense"))
    assert model.name_or_path == str(tmp_path / "dense")
    model.save_pretrained(tmp_path / "compressed")
    model = peft.get_peft_model(model, lora(FACTORS))
    descend(model)
    model.save_pretrained(tmp_path / "adapter")
    assert_fresh_process_gives([(tmp_path / "adapter", "adapter", logits(model))], tmp_path)


def test_a_loaded_model_keeps_its_name_when_it_is_saved_elsewhere(saved, tmp_path):
    model = load(saved("llama"))
    model.save_pretrained(tmp_path / "copy")
    assert model.name_or_path == str(saved("llama"))


def test_add_adapter_saves_the_adapter_alone(tmp_path):
    """Plan, report and loader belong to the checkpoint; they lay beside the adapter, too."""
    model = compressed(tiny("llama"))
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(lora(FACTORS))
    descend(model)
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    again = load(tmp_path / "base")
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load(tmp_path / "adapter")), logits(model))
    assert_fresh_process_gives([(tmp_path / "adapter", "adapter", logits(model))], tmp_path)


def test_layers_of_peft_are_not_saved_as_a_checkpoint(saved, tmp_path):
    """transformers would save `first.base_layer.weight`, which nothing can load."""
    wrapped = peft.get_peft_model(load(saved("llama")), lora(FACTORS))
    deleted = load(saved("llama"))
    deleted.add_adapter(lora(FACTORS))
    deleted.delete_adapter("default")
    head = peft.get_peft_model(load(saved("llama")), lora(["first"], modules_to_save=["lm_head"]))
    for model in (wrapped.get_base_model(), deleted, head.get_base_model()):
        with pytest.raises(ValueError, match=r"q_proj.first and \d+ other modules are layers of PEFT.*unload\(\)"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    plain = wrapped.unload()
    plain.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(saved("llama"))))


@pytest.mark.parametrize("structure", ["low_rank", "pivoted"])
def test_dequantize_does_not_lose_adapters(saved, tmp_path, structure):
    """It formed the dense matrix from the factors under the adapters, and dropped these without a word."""
    model = peft.get_peft_model(load(saved("llama", structure=structure)), lora(FACTORS))
    descend(model)
    healed = logits(model)
    with pytest.raises(ValueError, match=r"q_proj has adapters \(PEFT\), which would be lost: merge them"):
        model.dequantize()
    assert torch.equal(logits(model), healed)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "modeling_dobisvd.py").exists(), "a refused dequantize leaves our own save in place"
    dense = merged.dequantize()
    assert not compressed_linears(dense)
    assert torch.allclose(logits(dense), healed, atol=1e-3)


def test_adapters_beside_8_bit_linears_survive_dequantize(tmp_path):
    model = peft.get_peft_model(in_part(tmp_path / "base", "remap"), lora("all-linear"))
    descend(model)
    healed = logits(model)
    model.dequantize()
    assert not compressed_linears(model)
    assert torch.allclose(logits(model), healed, atol=1e-3)
