"""What cannot be stored by GPTQ or bitsandbytes is refused in words, before anything is computed or written."""

import importlib.util
import json
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTQConfig

from integration_tests.fresh_processes import run_python
from integration_tests.quantization.quantized_models import (
    SETTINGS,
    marked,
    needs_bnb,
    needs_gptq,
    planned,
    quantized,
    wide,
)
from integration_tests.statistics.tiny_model_statistics import windows_of
from integration_tests.tiny_models import tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, convert
from optimum_dobisvd.encodings.registry import encoding_of


def refusal(match: str, error: type[Exception] = ValueError, model: Any = None, **config: Any) -> None:
    """The compression of a model is refused in these words."""
    if config.keys().isdisjoint({"ratio", "budget", "plan"}):
        config["ratio"] = 0.25
    with pytest.raises(error, match=match):
        DobiSVDQuantizer(DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), **config)).quantize_model(
            model or wide("llama")
        )


def test_two_outer_configs_are_refused(tmp_path):
    refusal("quantization is a DobiSVDConfig.*drop it", quantization=DobiSVDConfig())
    refusal("quantization is a DobiSVDConfig.*drop it", quantization={"quant_method": "dobi_svd"})
    refusal("'awq', which factors cannot be stored in", quantization={"quant_method": "awq"})
    refusal("'awq', which factors cannot be stored in", quantization='{"quant_method": "awq"}')
    refusal("quantization is 'int', which factors cannot be stored in", quantization=4)
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd")).quantize_model(wide("llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DobiSVDConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SETTINGS["nf4"]())


@needs_gptq
def test_impossible_gptq_options_are_refused_before_anything_is_computed():
    refusal(
        "rank_multiple is 8, and gptq4_g32 takes ranks in multiples of 32",
        quantization=SETTINGS["gptq"](),
        rank_multiple=8,
    )
    refusal("group_size=-1.*act_group_aware=False", quantization=GPTQConfig(bits=4, group_size=-1))
    refusal("group_size=48.*none of gptqmodel's", quantization=GPTQConfig(bits=4, group_size=48))
    refusal(
        r"cannot be stored as gptq4_g256.*take group_size=128 \(on the command line gptq4_g128\)",
        quantization=GPTQConfig(bits=4, group_size=256),
    )
    refusal(
        "no backend 'nonsense'.*take one of .*marlin",
        quantization=GPTQConfig(bits=4, group_size=32, backend="nonsense"),
    )
    refusal(
        "which is found out here: leave them out",
        quantization=GPTQConfig(bits=4, group_size=32, block_name_to_quantize="model.layers"),
    )
    refusal("no 'storage' any more; write quantization.*mixed", quantization=SETTINGS["gptq"](), storage="int8")
    refusal(
        "takes ranks in multiples of 32, and it is to have 33",
        quantization=SETTINGS["gptq"](),
        overrides={"re:.*q_proj": {"rank": 33}},
    )
    with pytest.raises(ValueError, match="gptq4_g32 needs calibration text"):
        DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.2, quantization=SETTINGS["gptq"]())).quantize_model(
            wide("llama")
        )


def test_quantization_needs_a_size():
    """At the usual ratio it would have nothing to do."""
    with pytest.raises(ValueError, match=r"ratio counts the bits of quantization \(nf4 .*give ratio or budget"):
        DobiSVDConfig(quantization=SETTINGS["nf4"]())


def test_options_that_would_be_dropped_are_told(caplog):
    modules = {"q_proj": {"structure": "low_rank", "rank": 3, "encoding": "float"}}
    for options, words in (
        (
            {"quant_method": "gptq", "bits": 4, "group_sizee": 32},
            "GPTQConfig has no option 'group_sizee'.*'group_size'",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "BitsAndBytesConfig has no option 'bnb_4bit_quant_typ'"),
    ):
        with pytest.raises(ValueError, match=words):
            DobiSVDConfig(ratio=0.25, quantization=options)
        with pytest.raises(ValueError, match=words):  # as on a command line
            DobiSVDConfig(ratio=0.25, quantization=json.dumps(options))
        with pytest.raises(ValueError, match=words):  # asked for when a low-rank checkpoint is loaded
            DobiSVDConfig(modules=modules, quantization=options)
    for settings in (SETTINGS["gptq_desc_act"](), SETTINGS["nf4_dq"]()):  # all that they write themselves is known
        assert encoding_of(settings.to_dict()).settings.to_dict() == settings.to_dict()
    assert not [record for record in caplog.records if record.name.startswith("optimum_dobisvd")]
    DobiSVDConfig(ratio=0.25, quantization=GPTQConfig(bits=4, model_seqlen=512, batch_size=2))
    assert "GPTQConfig's model_seqlen, batch_size is not used: nsamples" in caplog.text


def test_settings_are_read_from_json_and_bad_ones_are_told():
    config = DobiSVDConfig(ratio=0.25, quantization='{"quant_method": "gptq", "bits": 3, "group_size": 64}')
    assert config.encoding.name == "gptq3_g64"
    nested = '{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true}'
    assert DobiSVDConfig(ratio=0.25, quantization=nested).encoding.name == "nf4_dq"
    refusal("quantization is no JSON", quantization='{"bits": 4,')
    refusal("unknown quantization 'gptq5'.*nf4_dq.*JSON", quantization="gptq5")
    refusal("quantizes nothing: pass load_in_4bit=True or load_in_8bit=True", quantization='{"load_in_4bit": false}')


@needs_bnb
def test_a_plan_of_another_encoding_is_refused_before_calibration():
    plan = planned(wide("llama"), [("nf4", None), ("float", 9)])
    for setting, words in (
        (None, "there is none"),
        (SETTINGS["nf4_dq"](), "quantization makes nf4_dq"),
        ("int8", "quantization makes int8"),
    ):
        refusal(
            f"the plan stores model.layers.0.self_attn.q_proj as nf4, and {words}: pass the quantization= that",
            plan=plan,
            quantization=setting,
        )


@needs_gptq
def test_an_encoding_that_fits_too_little_of_a_low_rank_model_is_refused():
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.8)).quantize_model(wide("llama"))
    before = [id(module) for module in model.modules()]
    model.config.quantization_config.min_coverage = 1.0
    words = r"take group_size=128 \(on the command line gptq4_g128\), or lower min_coverage \(1\)"
    with pytest.raises(ValueError, match=words):
        convert(model, GPTQConfig(bits=4, group_size=256), windows=windows_of(tokens(6, 24)))
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize("key", marked("gptq", "nf4"))
@pytest.mark.parametrize("encoding", ["int8", "remap"])
def test_a_model_in_our_own_8_bits_is_not_quantized_further(encoding, key):
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.8)).quantize_model(wide("llama"))
    convert(model, encoding)
    model.config.quantization_config.min_coverage = 1.0
    before = [id(module) for module in model.modules()]
    words = rf"q_proj, it is stored as {encoding}; start from .* or from convert\(model\)$"
    with pytest.raises(ValueError, match=words):
        convert(model, SETTINGS[key](), windows=windows_of(tokens(6, 24)))
    assert [id(module) for module in model.modules()] == before


@needs_gptq
def test_gptq_without_text_changes_nothing():
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.8)).quantize_model(wide("llama"))
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match="gptq4_g32 needs calibration text"):
        convert(model, SETTINGS["gptq"]())
    assert [id(module) for module in model.modules()] == before


@needs_bnb
def test_quantizing_at_load_without_the_package_is_refused(tmp_path):
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.8)).quantize_model(wide("llama"))
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quantization"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(config))
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    done = run_python(code, str(tmp_path / "out"), without_package_in=tmp_path)
    assert done.returncode == 1
    assert "needs the package: pip install optimum-dobisvd" in done.stderr


def test_impossible_sizes_are_refused():
    refusal("give one of them", ratio=0.5, budget="1MB")
    refusal("budget 1000 bytes: what is not compressed .* takes", budget="1KB")
    refusal("'large' is no size", budget="large")
    refusal("'0.5gb' ends in a small b, which means bits", budget="0.5gb")
    refusal("the size asked for leaves .* raise it to leave", budget=310_000)
    refusal("only method 'global' knows", mixed=True)


@pytest.mark.parametrize(("library", "key", "extra"), [("gptqmodel", "gptq", "gptq"), ("bitsandbytes", "nf4", "bnb")])
def test_a_missing_library_is_named_with_its_extra(library, key, extra, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == library else real(name, *a))
    refusal(rf"optimum-dobisvd\[{extra}\]", ImportError, quantization=SETTINGS[key]())


@needs_gptq
@needs_bnb
def test_disk_offload_is_refused_in_words(tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary_emb": "cpu"}
    for key, words in (("gptq", "cannot be offloaded to disk"), ("nf4", "dispatched on the CPU or the disk")):
        quantized(tmp_path / "dense", key, torch.bfloat16).save_pretrained(tmp_path / key)
        with pytest.raises(ValueError, match=words):
            AutoModelForCausalLM.from_pretrained(tmp_path / key, device_map=device_map, offload_folder=str(tmp_path))


@needs_gptq
def test_a_map_that_turns_out_to_offload_is_refused_in_words(tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantized(tmp_path / "dense", "gptq", torch.bfloat16).save_pretrained(tmp_path / "out")
    little = {"cpu": (tmp_path / "out" / "model.safetensors").stat().st_size // 2}
    with pytest.raises(ValueError, match="linears quantized by GPTQ cannot be offloaded"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", device_map="auto", max_memory=little, offload_folder=str(tmp_path / "offload")
        )


@pytest.mark.parametrize("key", marked("gptq", "nf4"))
def test_an_offloaded_model_is_not_quantized(key):
    """Neither a dense one, before it is calibrated, nor a low-rank one."""
    words = r"self_attn.q_proj is offloaded, and only what is in memory can be quantized"
    model = cpu_offload(wide("llama"), execution_device=torch.device("cpu"))
    config = DobiSVDConfig(method="output_pca", ratio=0.2, dataset=tokens(6, 24), quantization=SETTINGS[key]())
    with pytest.raises(ValueError, match=words):
        DobiSVDQuantizer(config).quantize_model(model)
    config = DobiSVDConfig(method="output_pca", ratio=0.8, dataset=tokens(6, 24))
    low_rank = cpu_offload(DobiSVDQuantizer(config).quantize_model(wide("llama")), torch.device("cpu"))
    with pytest.raises(ValueError, match=words):
        convert(low_rank, SETTINGS[key](), windows=windows_of(tokens(6, 24)))


@needs_bnb
def test_a_checkpoint_whose_config_was_tampered_with_is_refused(tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantized(tmp_path / "dense", "nf4", torch.bfloat16).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    original = json.loads(path.read_text())

    def refused(match, edit, error=ValueError):
        config = json.loads(json.dumps(original))
        edit(config["quantization_config"])
        path.write_text(json.dumps(config))
        with pytest.raises(error, match=match):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    entries = original["quantization_config"]["modules"]
    name = next(
        name for name, entry in entries.items() if entry == {"structure": "low_rank", "rank": 64, "encoding": "nf4"}
    )
    unsaid = "lists matrices in encoding nf4, and its 'quantization' does not say how they were quantized: copy"
    refused(unsaid, lambda config: config.pop("quantization"))
    refused(unsaid, lambda config: config.update(quantization="int8"))
    refused(unsaid, lambda config: config.update(quantization=SETTINGS["gptq"]().to_dict()))
    refused(name, lambda config: config["modules"][name].update(rank=128))
    refused(name, lambda config: config["modules"][name].update(rank=65))
    refused(
        "to another compression|lacks",
        lambda config: config["modules"].update({name: {"structure": "dense", "encoding": "nf4"}}),
    )
    refused(f"{name}: rank must be an integer", lambda config: config["modules"][name].update(rank=None), TypeError)


QUANTIZE = """
import shutil, sys, torch
from transformers import AutoModelForCausalLM, GPTQConfig
from optimum_dobisvd import DobiSVDConfig
assert shutil.which("c++") is None and shutil.which("gcc") is None and shutil.which("ninja") is None
settings = GPTQConfig(bits=4, group_size=32)
ids = torch.arange(2, 146).view(6, 24)
config = DobiSVDConfig(method="output_pca", ratio=0.3, dataset=ids, quantization=settings)
AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config).save_pretrained(sys.argv[2])
"""


@needs_gptq
def test_gptq_needs_no_compiler(tmp_path):
    """gptqmodel builds its packing where there is one; the files are the same without."""
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = DobiSVDConfig(
        method="output_pca",
        ratio=0.3,
        dataset=torch.arange(2, 146).view(6, 24),
        quantization=GPTQConfig(bits=4, group_size=32),
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(
        tmp_path / "a"
    )
    environment = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CXX": "", "CC": ""}
    done = run_python(QUANTIZE, str(tmp_path / "dense"), str(tmp_path / "b"), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
