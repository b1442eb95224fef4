"""Checkpoints in 8 bits: bit for bit in a new process, 8 bits in memory, wherever the weights lie."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from integration_tests.integrations.test_bad_checkpoints import edit_tensors
from integration_tests.integrations.test_round_trip import OFFLOAD, assert_reloaded_alike, logits
from integration_tests.processes import run_python
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.checkpoint.hf_quantizer import attach
from optimum_dobisvd.encodings.int8_matmul import KERNEL_CALLS
from optimum_dobisvd.nn.dense_linear import empty_compressed
from optimum_dobisvd.nn.eight_bit_linear import EightBitLinear

ARCHITECTURES = ("llama", "llama_tied", "qwen2", "mistral", "opt", "gemma2", "gpt2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("remap", "int8", "dense_int8", "plain")


def mixed_plan(model: torch.nn.Module) -> Plan:
    """Every form by turns, at odd ranks, which no kernel likes."""
    modules = {
        target.name: PlannedModule(None if form == "dense_int8" else 5 + index % 3, form)
        for index, (target, form) in enumerate(zip(find_layout(model).targets, FORMS * 99, strict=False))
    }
    return Plan(modules, method="output_pca", ratio=None, allocation="by hand")


def compressed(folder, dtype=torch.float32):
    """The dense model in a folder, compressed in all forms."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=mixed_plan(model))
    return DobiSVDQuantizer(config).quantize_model(model)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight") / "llama"
    tiny("llama", dtype=torch.bfloat16).save_pretrained(folder.parent / "dense")
    model = compressed(folder.parent / "dense", torch.bfloat16)
    model.save_pretrained(folder)
    return folder, logits(model)


def test_every_form_in_every_architecture_and_dtype_reloads_bit_for_bit_in_a_new_process(tmp_path):
    expected = {}
    for name in ARCHITECTURES:
        tiny(name).save_pretrained(tmp_path / name)
        for dtype in DTYPES:
            model = compressed(tmp_path / name, dtype)
            path = tmp_path / f"{name}-{str(dtype)[6:]}"
            model.save_pretrained(path)
            expected[path.name] = logits(model)
    assert_reloaded_alike(tmp_path, expected)


def test_it_loads_without_the_package(checkpoint, tmp_path):
    code = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(2, 26).view(2, 12)).logits.contiguous()}, sys.argv[2])
"""
    done = run_python(code, str(checkpoint[0]), str(tmp_path / "logits"), without_package_in=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(load_file(tmp_path / "logits")["logits"], checkpoint[1])


def test_the_bundled_loader_asks_for_nothing_but_torch_and_transformers(checkpoint):
    """transformers refuses to load such a file where any package that it imports is missing."""
    asked = set(get_imports(checkpoint[0] / "modeling_dobisvd.py"))
    assert asked - set(sys.stdlib_module_names) == {"torch", "transformers", "safetensors"}


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_maps(checkpoint, device_map):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], device_map=device_map)
    assert torch.equal(logits(model), checkpoint[1])


def test_cpu_and_disk_offload(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint[0], device_map=OFFLOAD, offload_folder=tmp_path / "offload"
    )
    offloaded = [module for module in model.model.layers[1].modules() if isinstance(module, EightBitLinear)]
    assert offloaded
    assert all(tensor.device.type == "meta" for module in offloaded for tensor in module.tensors().values())
    assert torch.equal(logits(model), checkpoint[1])
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), checkpoint[1])


def test_compress_on_load_under_disk_offload(checkpoint, tmp_path):
    plan = mixed_plan(AutoModelForCausalLM.from_pretrained(checkpoint[0].parent / "dense"))
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint[0].parent / "dense",
        quantization_config=config,
        device_map=OFFLOAD,
        offload_folder=tmp_path / "offload",
    )
    # Offloaded blocks are calibrated in bfloat16, those of the checkpoint in float32 where that is faster.
    assert float((logits(model) - checkpoint[1]).norm()) < 0.1 * float(checkpoint[1].norm())
    model.save_pretrained(tmp_path / "out")
    saved, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(checkpoint[0] / "model.safetensors")
    assert Counter((key, value.dtype, value.shape) for key, value in saved.items()) == Counter(
        (key, value.dtype, value.shape) for key, value in wanted.items()
    )


def test_shards(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")), checkpoint[1])


def test_another_dtype_on_load_keeps_the_8_bit_values(checkpoint):
    one = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    other = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float32)
    seen = set()
    for (name, module), (_, again) in zip(one.named_modules(), other.named_modules(), strict=True):
        if isinstance(module, EightBitLinear):
            seen.add(module.storage)
            assert torch.equal(module.dense_matrix(), again.dense_matrix()), name
            assert not any(tensor.requires_grad for tensor in again.tensors().values()), name
    assert seen == {"remap", "int8", "dense_int8"}
    assert float((logits(other) - checkpoint[1].float()).norm()) < 0.05 * float(logits(other).norm())


def test_dequantize_gives_the_same_function(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float32)
    wanted = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, EightBitLinear) for module in dense.modules())
    assert torch.allclose(logits(dense), wanted, atol=1e-4)


def test_8_bit_weights_are_not_trained_and_pass_gradients_on(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    assert not model.hf_quantizer.is_qat_trainable
    ids = tokens(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    assert float(model.model.embed_tokens.weight.grad.abs().sum()) > 0
    for module in model.modules():
        if isinstance(module, EightBitLinear):
            assert all(tensor.grad is None for tensor in module.tensors().values())


def test_it_computes_from_8_bits(checkpoint):
    before = KERNEL_CALLS.total()
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    logits(model)
    forms = Counter(module.storage for module in model.modules() if isinstance(module, EightBitLinear))
    # Two products for two factors, one for a whole matrix.
    assert KERNEL_CALLS.total() - before == 2 * (forms["remap"] + forms["int8"]) + forms["dense_int8"]


Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
DAMAGE = {
    "wrong length": (
        lambda t: t.update({f"{Q}.packed": t[f"{Q}.packed"][:-1]}),
        rf"{Q}.packed has shape \[31, 5\] in the checkpoint and \[32, 5\]",
    ),
    "not integers": (
        lambda t: t.update({f"{Q}.packed": t[f"{Q}.packed"].float()}),
        f"{Q}.packed is stored as F32 and must be I16",
    ),
    "missing": (lambda t: t.pop(f"{K}.second"), f"lacks {K}.second"),
    "zero scale": (lambda t: t[f"{K}.scale"].fill_(0), f"{K}.scale in .* zero, negative or not finite"),
    "NaN scale": (lambda t: t[f"{V}.scale"][:1].fill_(float("nan")), f"{V}.scale in .* zero, negative or not finite"),
    "negative scale": (lambda t: t[f"{Q}.scale"][:1].fill_(-1), f"{Q}.scale in .* zero, negative or not finite"),
    "another's tensor": (
        lambda t: t.update({f"{Q}.quantized": torch.zeros(32, 32, dtype=torch.int8)}),
        f"holds {Q}.quantized, but config.json does not list {Q} as compressed that way",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused(checkpoint, tmp_path, case):
    edit, message = DAMAGE[case]
    AutoModelForCausalLM.from_pretrained(checkpoint[0]).save_pretrained(tmp_path / "out")
    edit_tensors(tmp_path / "out", edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


CONFIG_DAMAGE = {
    "unknown storage": ({"rank": 5, "storage": "int5"}, f"{Q}: storage 'int5' is not known to this version"),
    "a rank for a whole matrix": ({"rank": 5, "storage": "dense_int8"}, f"{Q}: storage 'dense_int8' has no rank"),
    "no rank": ({"rank": None, "storage": "remap"}, f"{Q}: rank must be an integer"),
    "impossible rank": ({"rank": 999, "storage": "remap"}, f"{Q}: rank 999 in config.json is above"),
}


@pytest.mark.parametrize("case", CONFIG_DAMAGE)
def test_config_that_does_not_fit_is_refused(checkpoint, tmp_path, case):
    entry, message = CONFIG_DAMAGE[case]
    AutoModelForCausalLM.from_pretrained(checkpoint[0]).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["modules"][Q] = entry
    path.write_text(json.dumps(values))
    with pytest.raises((ValueError, TypeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


MEMORY = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

def resident():
    rows = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return 1024 * sum(int(rows[key].split()[0]) for key in ("RssAnon", "RssFile"))

AutoModelForCausalLM.from_pretrained(sys.argv[1])  # what is loaded once: code, caches, threads
before = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
for tensor in (*model.parameters(), *model.buffers()):
    tensor.view(-1)[::512].clone()  # every page of it, should it be a mapped file
print(resident() - before)
"""


def large_checkpoint(folder, storage):
    """Hundreds of megabytes of random factors: what else a process allocates is nothing beside them."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}
    config = AutoConfig.for_model("llama", **shape, num_key_value_heads=4, vocab_size=300)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    modules = {}
    for name, linear in find_layout(model).linears.items():
        rank = None if storage == "dense_int8" else min(linear.weight.shape) // 2
        new = empty_compressed(linear, storage, rank, device="cpu")
        for tensor in new.tensors().values():
            tensor.fill_(1)
        model.set_submodule(name, new)
        modules[name] = {"rank": rank, "storage": storage}
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            owner, _, key = name.rpartition(".")
            values = torch.ones(parameter.shape, dtype=parameter.dtype)
            setattr(model.get_submodule(owner), key, torch.nn.Parameter(values))
    attach(model, DobiSVDConfig(method="svd", modules=modules))
    model.save_pretrained(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells how much memory a process holds")
@pytest.mark.parametrize("storage", ["int8", "remap", "dense_int8"])
def test_memory_after_loading_is_what_lies_on_disk(checkpoint, tmp_path, storage):
    large_checkpoint(tmp_path / "out", storage)
    disk = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert disk > 150_000_000
    done = run_python(MEMORY, str(checkpoint[0]), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0.9 * disk <= int(done.stdout) <= 1.02 * disk
