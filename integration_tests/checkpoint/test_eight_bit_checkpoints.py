"""Checkpoints in 8 bits: bit for bit in a new process, 8 bits in memory, wherever the weights lie."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from integration_tests.checkpoint.damage import edit_config, edit_tensors
from integration_tests.checkpoint.reloading import OFFLOADED, assert_reloaded_alike, logits
from integration_tests.fresh_processes import run_python
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.checkpoint.hf_quantizer import attach
from optimum_dobisvd.checkpoint.loading import empty_compressed
from optimum_dobisvd.encodings.int8 import Int8Linear
from optimum_dobisvd.encodings.int8_matmul import KERNEL_CALLS
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.structures.base import compressed_linears
from optimum_dobisvd.structures.format import format_named

ARCHITECTURES = ("llama", "llama_tied", "qwen2", "mistral", "opt", "gemma2", "gpt2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EIGHT_BIT = (("low_rank", "remap"), ("low_rank", "int8"), ("dense", "int8"), ("pivoted", "int8"))
FORMATS = (*EIGHT_BIT, ("pivoted", "float"), ("low_rank", "float"))


def mixed_plan(model: torch.nn.Module) -> Plan:
    """Every format by turns, at odd ranks, which no kernel likes."""
    targets = find_layout(model).targets
    modules = {
        target.name: PlannedModule(structure, encoding, None if structure == "dense" else 5 + index % 3)
        for index, (target, (structure, encoding)) in enumerate(zip(targets, FORMATS * 99, strict=False))
    }
    return Plan(modules, method="output_pca", ratio=None, allocation="by hand")


def int8_linears(model: torch.nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def own_tensors(linear: Int8Linear) -> list[torch.Tensor]:
    """All but the bias."""
    return [tensor for name, tensor in linear.named_parameters() if name != "bias"]


def compressed(folder, dtype=torch.float32):
    """The dense model in a folder, compressed in all formats."""
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


def test_every_format_in_every_architecture_and_dtype_reloads_bit_for_bit_in_a_new_process(tmp_path):
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
        checkpoint[0], device_map=OFFLOADED, offload_folder=tmp_path / "offload"
    )
    offloaded = int8_linears(model.model.layers[1]).values()
    assert offloaded
    assert all(tensor.device.type == "meta" for linear in offloaded for tensor in linear.parameters())
    assert torch.equal(logits(model), checkpoint[1])
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), checkpoint[1])


def test_compress_on_load_under_disk_offload(checkpoint, tmp_path):
    plan = mixed_plan(AutoModelForCausalLM.from_pretrained(checkpoint[0].parent / "dense"))
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint[0].parent / "dense",
        quantization_config=config,
        device_map=OFFLOADED,
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
    again = compressed_linears(other)
    seen = set()
    for name, module in compressed_linears(one).items():
        if module.encoding != "float":
            seen.add((module.structure, module.encoding))
            assert torch.equal(module.dense_matrix(), again[name].dense_matrix()), name
            linears = int8_linears(again[name]).values()
            assert len(linears) == (1 if module.structure == "dense" else 2), name
            assert not any(tensor.requires_grad for linear in linears for tensor in own_tensors(linear)), name
    assert seen == set(EIGHT_BIT)
    assert float((logits(other) - checkpoint[1].float()).norm()) < 0.05 * float(logits(other).norm())


def test_dequantize_gives_the_same_function(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.float32)
    wanted = logits(model)
    dense = model.dequantize()
    assert not int8_linears(dense)
    assert not compressed_linears(dense)
    assert torch.allclose(logits(dense), wanted, atol=1e-4)


def test_8_bit_weights_are_not_trained_and_pass_gradients_on(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    assert not model.hf_quantizer.is_qat_trainable
    ids = tokens(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    assert float(model.model.embed_tokens.weight.grad.abs().sum()) > 0
    for name, linear in int8_linears(model).items():
        assert all(tensor.grad is None for tensor in own_tensors(linear)), name


def test_it_computes_from_8_bits(checkpoint):
    before = KERNEL_CALLS.total()
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    logits(model)
    formats = Counter((each.structure, each.encoding) for each in compressed_linears(model).values())
    assert all(formats[key] > 0 for key in EIGHT_BIT)
    # Two products for two factors, one for a matrix that is not factorized.
    factorized = formats["low_rank", "remap"] + formats["low_rank", "int8"] + formats["pivoted", "int8"]
    assert KERNEL_CALLS.total() - before == 2 * factorized + formats["dense", "int8"]


Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
GATE = "model.layers.2.mlp.gate_proj"  # 48 x 32 in remap: 16 rows of `second` are not in 8 bits
BAD_SCALE = "zero, negative or not finite"
NOT_LISTED = "but config.json does not list {} as compressed that way"
DAMAGE = {
    "wrong length": (
        lambda t: t.update({f"{Q}.second.weight": t[f"{Q}.second.weight"][:-1]}),
        rf"{Q}.second.weight has shape \[31, 5\] in the checkpoint and \[32, 5\]",
    ),
    "wrong length in 16 bits": (
        lambda t: t.update({f"{GATE}.second.rest": t[f"{GATE}.second.rest"][:-1]}),
        rf"{GATE}.second.rest has shape \[15, 5\] in the checkpoint and \[16, 5\]",
    ),
    "not integers": (
        lambda t: t.update({f"{Q}.second.weight": t[f"{Q}.second.weight"].float()}),
        f"{Q}.second.weight is stored as F32 and must be I8",
    ),
    "missing": (lambda t: t.pop(f"{K}.second.weight"), f"lacks {K}.second.weight"),
    "missing scale": (lambda t: t.pop(f"{V}.linear.scale"), f"lacks {V}.linear.scale"),
    "zero scale": (lambda t: t[f"{K}.second.scale"].fill_(0), f"{K}.second.scale in .* {BAD_SCALE}"),
    "NaN scale": (lambda t: t[f"{V}.linear.scale"][:1].fill_(float("nan")), f"{V}.linear.scale in .* {BAD_SCALE}"),
    "infinite scale": (lambda t: t[f"{K}.first.scale"][:1].fill_(torch.inf), f"{K}.first.scale in .* {BAD_SCALE}"),
    "negative scale": (lambda t: t[f"{Q}.second.scale"][:1].fill_(-1), f"{Q}.second.scale in .* {BAD_SCALE}"),
    "another's tensor": (
        lambda t: t.update({f"{Q}.linear.weight": torch.zeros(32, 32, dtype=torch.int8)}),
        f"holds {Q}.linear.weight, {NOT_LISTED.format(Q)}",
    ),
    "another encoding's tensor": (
        lambda t: t.update({f"{K}.second.rest": torch.zeros(2, 6)}),
        f"holds {K}.second.rest, {NOT_LISTED.format(K)}",
    ),
    "a tensor of version 1": (
        lambda t: t.update({f"{Q}.packed": torch.zeros(32, 5, dtype=torch.int16)}),
        f"holds {Q}.packed, {NOT_LISTED.format(Q)}",
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
    "unknown encoding": (("low_rank", 5, "int5"), f"{Q}: unknown encoding 'int5'.* this version cannot read it"),
    "a rank for a dense matrix": (("dense", 5, "int8"), f"{Q}: structure 'dense' has no rank, config.json says 5"),
    "no rank": (("low_rank", None, "remap"), f"{Q}: rank must be an integer"),
    "impossible rank": (("low_rank", 999, "remap"), f"{Q}: rank 999 in config.json is above"),
    "another encoding": (("low_rank", 5, "float"), f"holds {Q}.first.scale, {NOT_LISTED.format(Q)}"),
    "another structure": (("dense", None, "int8"), f"lacks {Q}.linear.weight, which config.json promises"),
    "pivots": (("pivoted", 5, "int8"), rf"{Q}.second.scale has shape \[32\] .* and \[27\] by config.json"),
    "pivots in an encoding for others": (("pivoted", 5, "remap"), f"{Q}: config.json cannot be right, remap is for"),
}


@pytest.mark.parametrize("case", CONFIG_DAMAGE)
def test_config_that_does_not_fit_is_refused(checkpoint, tmp_path, case):
    (structure, rank, encoding), message = CONFIG_DAMAGE[case]
    entry = {"structure": structure, "rank": rank, "encoding": encoding}
    AutoModelForCausalLM.from_pretrained(checkpoint[0]).save_pretrained(tmp_path / "out")
    edit_config(tmp_path / "out", lambda config: config["modules"].update({Q: entry}))
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


def large_checkpoint(folder, structure, encoding):
    """Hundreds of megabytes of random factors: what else a process allocates is nothing beside them."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}
    config = AutoConfig.for_model("llama", **shape, num_key_value_heads=4, vocab_size=300)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    modules = {}
    for name, linear in find_layout(model).linears.items():
        rank = None if structure == "dense" else min(linear.weight.shape) // 2
        new = empty_compressed(name, linear, format_named(structure, encoding), rank).to_empty(device="cpu")
        for tensor in new.parameters():
            tensor.fill_(1)
        for tensor in new.own().values():
            tensor.copy_(torch.arange(len(tensor)))
        model.set_submodule(name, new)
        modules[name] = PlannedModule(structure, encoding, rank).to_dict()
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            owner, _, key = name.rpartition(".")
            values = torch.ones(parameter.shape, dtype=parameter.dtype)
            setattr(model.get_submodule(owner), key, torch.nn.Parameter(values))
    attach(model, DobiSVDConfig(method="svd", modules=modules))
    model.save_pretrained(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells how much memory a process holds")
@pytest.mark.parametrize(("structure", "encoding"), EIGHT_BIT)
def test_memory_after_loading_is_what_lies_on_disk(checkpoint, tmp_path, structure, encoding):
    large_checkpoint(tmp_path / "out", structure, encoding)
    disk = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert disk > 150_000_000
    done = run_python(MEMORY, str(checkpoint[0]), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0.9 * disk <= int(done.stdout) <= 1.02 * disk
