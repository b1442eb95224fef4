"""save_pretrained -> new process -> from_pretrained, bit for bit, and what else a loaded model must be able to do."""

import copy
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, StaticCache

from integration_tests.checkpoint.reloading import OFFLOADED, assert_reloaded_alike, compressed, logits
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, load_quantized_model
from optimum_dobisvd.model.footprint import resident_bytes
from optimum_dobisvd.structures.base import CompressedLinear, compressed_linears, is_compressed

ARCHITECTURES = ("llama", "llama_tied", "qwen2", "mistral", "opt", "gemma", "gemma2", "phi", "gpt_neox", "gpt2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


TYPE_OF = {"low_rank": "llama", "pivoted": "qwen2"}
"""Of the model of a structure: pivoted linears have a bias of their own, which takes part in all that is done here."""


@pytest.fixture(scope="module", params=list(TYPE_OF))
def structure(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, structure):
    folder = tmp_path_factory.mktemp("saved") / structure
    model = compressed(tiny(TYPE_OF[structure]), structure=structure)
    model.save_pretrained(folder)
    return folder, logits(model)


BOTH_STRUCTURES = ("llama_tied", "qwen2", "gpt2")
"""Tied embeddings, biases, `Conv1D`; the other architectures are `low_rank` alone."""


def test_every_architecture_and_dtype_reloads_bit_for_bit_in_a_process_that_never_imports_the_plugin(tmp_path):
    expected = {}
    for name in ARCHITECTURES:
        tiny(name).save_pretrained(tmp_path / name)
        for structure in ("low_rank", "pivoted") if name in BOTH_STRUCTURES else ("low_rank",):
            for dtype in DTYPES:
                config = DobiSVDConfig(method="output_pca", ratio=0.6, dataset=tokens(6, 24), structure=structure)
                model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype, quantization_config=config)
                assert {module.structure for module in compressed_linears(model).values()} == {structure}
                path = tmp_path / f"{name}-{structure}-{str(dtype)[6:]}"
                model.save_pretrained(path)
                expected[path.name] = logits(model)
    assert_reloaded_alike(tmp_path, expected)


def test_compress_on_load_equals_the_quantizer_and_reports(tmp_path):
    dense = tiny("qwen2")
    dense.save_pretrained(tmp_path / "dense")
    config = DobiSVDConfig(method="svd_llm_v2", ratio=0.7, dataset=tokens(6, 24))
    on_load = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    by_hand = compressed(dense, method="svd_llm_v2", ratio=0.7)
    assert torch.equal(logits(on_load), logits(by_hand))
    report = on_load.dobisvd_report
    assert 10 * report.target_bytes <= 7 * report.dense_target_bytes
    assert config.modules is None, "the user's own config object must not change"


def test_config_json_keeps_nothing_of_the_run(checkpoint, structure):
    saved = json.loads((checkpoint[0] / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "dobi_svd"
    assert saved["dataset"] == "tokens"
    assert not {"tokenizer", "statistics", "plan", "device", "batch_size"} & set(saved)
    assert saved["modules"]["model.layers.0.self_attn.q_proj"] == {
        "structure": structure,
        "rank": {"low_rank": 10, "pivoted": 11}[structure],
        "encoding": "float",
    }


def test_memory_counts_every_weight_once(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    assert resident_bytes(model) == sum(held.values())


def test_saving_again_changes_nothing(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    model.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "modeling_dobisvd.py"):
        assert (tmp_path / "again" / name).read_bytes() == (checkpoint[0] / name).read_bytes(), name


def test_sharded_files(checkpoint, tmp_path):
    model = load_quantized_model(checkpoint[0])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")), checkpoint[1])
    # and back to one file: the old shards must not stay behind
    model.save_pretrained(tmp_path / "sharded")
    assert [p.name for p in (tmp_path / "sharded").glob("model*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")), checkpoint[1])


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(checkpoint, device_map):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], device_map=device_map)
    assert torch.equal(logits(model), checkpoint[1])


def test_cpu_and_disk_offload(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint[0], device_map=OFFLOADED, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].mlp.up_proj.first.weight.device.type == "meta"
    assert torch.equal(logits(model), checkpoint[1])
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), checkpoint[1])


def test_compress_on_load_under_disk_offload(checkpoint, structure, tmp_path):
    tiny(TYPE_OF[structure]).save_pretrained(tmp_path / "dense")
    config = DobiSVDConfig(method="output_pca", ratio=0.6, dataset=tokens(6, 24), structure=structure)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, device_map=OFFLOADED, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].mlp.up_proj.structure == structure
    # Coefficients of other rows carry the last bit of a pivot row further than scaled factors do.
    assert torch.allclose(logits(model), checkpoint[1], atol=1e-5 if structure == "low_rank" else 1e-4)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_dequantize_gives_a_plain_dense_model_of_the_same_function(name, structure, tmp_path):
    model = compressed(tiny(name), structure=structure)
    assert {module.structure for module in compressed_linears(model).values()} == {structure}
    before = logits(model)
    dense = model.dequantize()
    assert not is_compressed(dense)
    assert torch.allclose(logits(dense), before, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    saved = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in saved
    assert "auto_map" not in saved
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(reloaded) is type(tiny(name))
    assert torch.equal(logits(reloaded), logits(dense))


def test_the_headless_model_reads_the_same_checkpoint(checkpoint):
    full = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    body = AutoModel.from_pretrained(checkpoint[0])
    assert isinstance(body.layers[0].self_attn.q_proj, CompressedLinear)
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        assert torch.equal(body(input_ids=ids).last_hidden_state, full.model(input_ids=ids).last_hidden_state)


def test_dtype_can_be_chosen_at_load(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.second.weight.dtype == torch.bfloat16


def test_casts_and_copies_of_a_model_keep_its_integers(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    integers = {name: tensor for name, tensor in model.named_buffers() if not tensor.is_floating_point()}
    for cast in (
        copy.deepcopy(model),
        copy.deepcopy(model).to(torch.bfloat16),
        copy.deepcopy(model).to(torch.float16),
    ):
        kept = {name: tensor for name, tensor in cast.named_buffers() if not tensor.is_floating_point()}
        assert kept.keys() == integers.keys()
        for name, tensor in integers.items():
            assert kept[name].dtype == tensor.dtype
            assert torch.equal(kept[name], tensor), name
        found = logits(cast)
        assert found.dtype == cast.dtype
        assert float((found.float() - checkpoint[1]).norm()) < 0.05 * float(checkpoint[1].norm())


def test_generate_with_a_static_cache_equals_generate_without(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    ids = torch.arange(2, 10)[None]
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, min_new_tokens=8)
    cache = StaticCache(config=model.config, max_cache_len=32)
    static = model.generate(ids, max_new_tokens=8, do_sample=False, min_new_tokens=8, past_key_values=cache)
    assert torch.equal(plain, static)


def test_compiled_forward_without_graph_breaks(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    layer = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.allclose(layer(x), model.model.layers[0].mlp(x), atol=1e-5)


def test_a_whole_forward_compiles_without_graph_breaks(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(compiled(input_ids=ids, use_cache=False).logits, checkpoint[1], atol=1e-5)


def test_children_are_exactly_linear_and_the_head_stays(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    layer = model.model.layers[0].self_attn.q_proj
    assert [type(child) for child in layer.children()] == [torch.nn.Linear, torch.nn.Linear]
    assert layer.first.bias is None
    assert layer.second.bias is None
    assert type(model.lm_head) is torch.nn.Linear


def test_factors_can_be_trained(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0]).train()
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    ids = torch.arange(2, 26).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    assert float(model.model.layers[0].mlp.up_proj.first.weight.grad.abs().sum()) > 0


def test_dequantize_refuses_what_is_offloaded(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint[0], device_map=OFFLOADED, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match="offloaded; load the model without"):
        model.dequantize()
    assert torch.equal(logits(model), checkpoint[1])


def test_dequantize_after_saving(checkpoint, tmp_path):
    """transformers' save leaves the dtype's name in the config, which was taken for that of a device."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0])
    model.save_pretrained(tmp_path / "again")
    dense = model.dequantize()
    assert not is_compressed(dense)
    assert torch.allclose(logits(dense), checkpoint[1], atol=1e-4)


def test_dequantize_to_a_dtype(checkpoint):
    dense = AutoModelForCausalLM.from_pretrained(checkpoint[0]).dequantize(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}


def test_compressed_in_inference_mode_it_can_still_be_trained_and_frozen_stays_frozen():
    model = tiny("llama")
    model.model.layers[0].requires_grad_(False)
    with torch.inference_mode():
        compressed(model)
    assert not any(parameter.requires_grad for parameter in model.model.layers[0].parameters())
    ids = torch.arange(2, 26).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    assert float(model.model.layers[1].mlp.up_proj.second.weight.grad.abs().sum()) > 0


def test_a_model_with_adapters_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny("llama")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="has adapters"):
        compressed(model)


def test_a_method_this_version_does_not_know_loads_all_the_same(checkpoint, tmp_path):
    AutoModelForCausalLM.from_pretrained(checkpoint[0]).save_pretrained(tmp_path / "later")
    path = tmp_path / "later" / "config.json"
    path.write_text(path.read_text().replace('"output_pca"', '"learned_next_year"'))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "later")), checkpoint[1])


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_the_batch_size_changes_nothing_even_where_the_last_batch_is_smaller(name):
    """Arguments of the blocks are recorded per batch and shared between equal ones: a mix-up would be silent."""
    ids = tokens(5, 24)
    by_ones = compressed(tiny(name), dataset=ids, batch_size=1)
    by_fours = compressed(tiny(name), dataset=ids, batch_size=4)
    assert torch.allclose(logits(by_ones), logits(by_fours), rtol=1e-3, atol=1e-3)
