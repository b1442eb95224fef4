"""What cannot be stacked on low rank is refused in words, before anything is computed or written."""

import importlib.util
import json

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTQConfig

from integration_tests.integrations.test_inner_checkpoints import (
    INNER,
    needs_bnb,
    needs_gptq,
    planned,
    stacked,
    wide,
)
from integration_tests.processes import run_python
from integration_tests.tiny_models import tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.inner import inner_config, inner_from_name
from optimum_dobisvd.checkpoint.hf_quantizer import stack_inner, store_as


def refusal(match, error=ValueError, model=None, **config):
    if config.keys().isdisjoint({"ratio", "budget", "plan"}):
        config["ratio"] = 0.25
    with pytest.raises(error, match=match):
        DobiSVDQuantizer(DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), **config)).quantize_model(
            model or wide("llama")
        )


def test_two_outer_configs_are_refused(tmp_path):
    refusal("inner is a DobiSVDConfig.*drop it", inner=DobiSVDConfig())
    refusal("inner is a dobi_svd configuration", inner={"quant_method": "dobi_svd"})
    refusal("'awq', which cannot be stacked", inner={"quant_method": "awq"})
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd")).quantize_model(wide("llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DobiSVDConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=INNER["nf4"]())


@needs_gptq
def test_impossible_gptq_options_are_refused_before_anything_is_computed():
    refusal("rank_multiple is 8, and gptq4_g32 takes ranks in multiples of 32", inner=INNER["gptq"](), rank_multiple=8)
    refusal("group_size=-1.*act_group_aware=False", inner=GPTQConfig(bits=4, group_size=-1))
    refusal("group_size=48.*none of gptqmodel's", inner=GPTQConfig(bits=4, group_size=48))
    refusal(
        r"cannot be stored as gptq4_g256.*take group_size=128 \(on the command line gptq4_g128\)",
        inner=GPTQConfig(bits=4, group_size=256),
    )
    refusal("no backend 'nonsense'.*take one of .*marlin", inner=GPTQConfig(bits=4, group_size=32, backend="nonsense"))
    refusal(
        "which is found out here: leave them out",
        inner=GPTQConfig(bits=4, group_size=32, block_name_to_quantize="model.layers"),
    )
    refusal("storage 'int8' are none.*mixed", inner=INNER["gptq"](), storage="int8")
    refusal(
        "takes ranks in multiples of 32, and it is to have 33",
        inner=INNER["gptq"](),
        overrides={"re:.*q_proj": {"rank": 33}},
    )
    with pytest.raises(ValueError, match="GPTQ needs calibration text"):
        DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.2, inner=INNER["gptq"]())).quantize_model(wide("llama"))


def test_inner_needs_a_size():
    """At the usual ratio it would have nothing to do."""
    with pytest.raises(ValueError, match="ratio counts its bits.*give ratio or budget"):
        DobiSVDConfig(inner=INNER["nf4"]())


def test_options_that_would_be_dropped_are_told(caplog):
    for options, words in (
        (
            {"quant_method": "gptq", "bits": 4, "group_sizee": 32},
            "GPTQConfig has no option 'group_sizee'.*'group_size'",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "BitsAndBytesConfig has no option 'bnb_4bit_quant_typ'"),
    ):
        with pytest.raises(ValueError, match=words):
            DobiSVDConfig(ratio=0.25, inner=options)
        with pytest.raises(ValueError, match=words):
            inner_from_name(json.dumps(options))
        with pytest.raises(ValueError, match=words):  # asked for when a low-rank checkpoint is loaded
            DobiSVDConfig(modules={"q_proj": {"rank": 3, "storage": "plain"}}, inner=options)
    for inner in (INNER["gptq_desc_act"](), INNER["nf4_dq"]()):  # all that they write themselves is known
        assert inner_config(inner.to_dict(), wished=True).to_dict() == inner.to_dict()
    assert not [record for record in caplog.records if record.name.startswith("optimum_dobisvd")]
    DobiSVDConfig(ratio=0.25, inner=GPTQConfig(bits=4, model_seqlen=512, batch_size=2))
    assert "GPTQConfig's model_seqlen, batch_size is not used: nsamples" in caplog.text


@needs_bnb
def test_a_plan_of_another_inner_is_refused_before_calibration():
    plan = planned(wide("llama"), [("nf4", None), ("plain", 9)])
    for inner, words in ((None, "there is no inner"), (INNER["nf4_dq"](), "inner makes nf4_dq")):
        refusal(f"the plan stores model.layers.0.self_attn.q_proj as nf4, and {words}", plan=plan, inner=inner)


@pytest.mark.parametrize("key", [pytest.param("gptq", marks=needs_gptq), pytest.param("nf4", marks=needs_bnb)])
def test_a_form_that_fits_too_little_of_a_low_rank_model_is_refused(key):
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.8)).quantize_model(wide("llama"))
    before = [id(module) for module in model.modules()]
    model.config.quantization_config.min_coverage = 1.0
    narrow = {"gptq": GPTQConfig(bits=4, group_size=256), "nf4": INNER["nf4"]()}[key]
    if key == "nf4":
        store_as(model, "int8")
        before = [id(module) for module in model.modules()]
    words = {
        "gptq": r"take group_size=128 \(on the command line gptq4_g128\), or lower min_coverage \(1\)",
        "nf4": r"q_proj, it is stored as (dense_)?int8; start from .* or from store_as\(model, 'plain'\)$",
    }[key]
    with pytest.raises(ValueError, match=words):
        stack_inner(model, narrow, None)
    assert [id(module) for module in model.modules()] == before


@needs_bnb
def test_stacking_without_the_package_is_refused(tmp_path):
    model = DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.8)).quantize_model(wide("llama"))
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["inner"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
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
    refusal("only method 'global' knows", storage="mixed")


@pytest.mark.parametrize(("library", "key", "extra"), [("gptqmodel", "gptq", "gptq"), ("bitsandbytes", "nf4", "bnb")])
def test_a_missing_library_is_named_with_its_extra(library, key, extra, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == library else real(name, *a))
    refusal(rf"optimum-dobisvd\[{extra}\]", ImportError, inner=INNER[key]())


@needs_gptq
@needs_bnb
def test_disk_offload_is_refused_in_words(tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary_emb": "cpu"}
    for key, words in (("gptq", "cannot be offloaded to disk"), ("nf4", "dispatched on the CPU or the disk")):
        stacked(tmp_path / "dense", key, torch.bfloat16).save_pretrained(tmp_path / key)
        with pytest.raises(ValueError, match=words):
            AutoModelForCausalLM.from_pretrained(tmp_path / key, device_map=device_map, offload_folder=str(tmp_path))


@needs_gptq
def test_a_map_that_turns_out_to_offload_is_refused_in_words(tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    stacked(tmp_path / "dense", "gptq", torch.bfloat16).save_pretrained(tmp_path / "out")
    little = {"cpu": (tmp_path / "out" / "model.safetensors").stat().st_size // 2}
    with pytest.raises(ValueError, match="linears quantized by GPTQ cannot be offloaded"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", device_map="auto", max_memory=little, offload_folder=str(tmp_path / "offload")
        )


@pytest.mark.parametrize("key", [pytest.param("gptq", marks=needs_gptq), pytest.param("nf4", marks=needs_bnb)])
def test_an_offloaded_model_is_not_quantized(key):
    """Neither a dense one, before it is calibrated, nor a low-rank one."""
    words = r"self_attn.q_proj is offloaded, and GPTQ and bitsandbytes quantize only what is in memory"
    model = cpu_offload(wide("llama"), execution_device=torch.device("cpu"))
    config = DobiSVDConfig(method="output_pca", ratio=0.2, dataset=tokens(6, 24), inner=INNER[key]())
    with pytest.raises(ValueError, match=words):
        DobiSVDQuantizer(config).quantize_model(model)
    config = DobiSVDConfig(method="output_pca", ratio=0.8, dataset=tokens(6, 24))
    low_rank = cpu_offload(DobiSVDQuantizer(config).quantize_model(wide("llama")), torch.device("cpu"))
    with pytest.raises(ValueError, match=words):
        stack_inner(low_rank, INNER[key](), None)


@needs_bnb
def test_a_checkpoint_whose_config_was_tampered_with_is_refused(tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    stacked(tmp_path / "dense", "nf4", torch.bfloat16).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    original = json.loads(path.read_text())

    def refused(match, edit):
        config = json.loads(json.dumps(original))
        edit(config["quantization_config"])
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=match):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    name = next(n for n, e in original["quantization_config"]["modules"].items() if e["storage"] == "nf4")
    refused("does not say how they were quantized", lambda config: config.pop("inner"))
    refused(name, lambda config: config["modules"][name].update(rank=128))
    refused("to another compression|lacks", lambda config: config["modules"][name].update(rank=None))


QUANTISE = """
import shutil, sys, torch
from transformers import AutoModelForCausalLM, GPTQConfig
from optimum_dobisvd import DobiSVDConfig
assert shutil.which("c++") is None and shutil.which("gcc") is None and shutil.which("ninja") is None
config = DobiSVDConfig(
    method="output_pca", ratio=0.3, dataset=torch.arange(2, 146).view(6, 24), inner=GPTQConfig(bits=4, group_size=32)
)
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
        inner=GPTQConfig(bits=4, group_size=32),
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(
        tmp_path / "a"
    )
    environment = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "CXX": "", "CC": ""}
    done = run_python(QUANTISE, str(tmp_path / "dense"), str(tmp_path / "b"), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
