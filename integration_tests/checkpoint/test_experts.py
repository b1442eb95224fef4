"""Checkpoints of compressed mixtures: bit for bit in another process, with the package and without; back to dense."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from integration_tests.checkpoint.reloading import OFFLOADED, assert_reloaded_alike, compressed, logits
from integration_tests.fresh_processes import run_python
from integration_tests.tiny_models import MIXTURE_TYPES, tiny, tokens
from optimum_dobisvd import DobiSVDConfig, convert
from optimum_dobisvd.model.experts import linearized_experts
from optimum_dobisvd.structures.base import compressed_linears

WITHOUT_PACKAGE = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for path, out in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    with torch.no_grad():
        save_file({"logits": model(input_ids=torch.arange(2, 26).view(2, 12)).logits.contiguous()}, out)
assert "optimum_dobisvd" not in sys.modules
"""


def test_mixtures_are_reloaded_alike_in_another_process(tmp_path: Path) -> None:
    expected = {}
    for model_type in MIXTURE_TYPES:
        model = compressed(tiny(model_type), method="svd_llm_v2")
        model.save_pretrained(tmp_path / model_type)
        expected[model_type] = logits(model)
    tiny("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    bfloat16 = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    model = compressed(bfloat16, method="global", quantization="int8", ratio=0.5)
    model.save_pretrained(tmp_path / "int8")
    expected["int8"] = logits(model)
    assert_reloaded_alike(tmp_path, expected)
    jobs = [(str(tmp_path / name), str(tmp_path / f"{name}.bare")) for name in expected]
    done = run_python(WITHOUT_PACKAGE, json.dumps(jobs), without_package_in=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, wanted in expected.items():
        assert torch.equal(load_file(tmp_path / f"{name}.bare")["logits"], wanted), name


@pytest.mark.parametrize("method", ["global", "svd_llm_v2"])
def test_experts_that_are_given_a_single_token_are_reloaded_alike(method: str, tmp_path: Path) -> None:
    """Of 48 choices among 32 experts most get one; such a product may depend on where a matrix begins in memory."""
    model = compressed(tiny("qwen3_moe", num_experts=32), method=method)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_config_lists_every_matrix_of_every_expert(tmp_path: Path) -> None:
    model = compressed(tiny("mixtral"))
    model.save_pretrained(tmp_path / "out")
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    assert "model.layers.2.mlp.experts.3.down_proj" in modules
    assert modules.keys() == compressed_linears(model).keys()
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if key.endswith(("gate_up_proj", "experts.down_proj"))]  # noqa: SIM118


def test_experts_that_stayed_dense_beside_compressed_ones_come_back(tmp_path: Path) -> None:
    model = compressed(tiny("deepseek_v3"), modules_to_not_convert=["re:.*experts[.][12][.].*", "layers.1"])
    model.save_pretrained(tmp_path / "out", max_shard_size="60KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))


def test_experts_that_all_stayed_dense_come_back_stacked(tmp_path: Path) -> None:
    model = compressed(tiny("mixtral"), modules_to_not_convert=["experts"])
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert not linearized_experts(again)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_compression_at_load_is_the_same_as_in_memory(model_type: str, tmp_path: Path) -> None:
    tiny(model_type).save_pretrained(tmp_path / "dense")
    settings: dict[str, Any] = {"method": "global", "ratio": 0.6, "dataset": tokens(6, 24)}
    at_load = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=DobiSVDConfig(**settings))
    assert torch.equal(logits(at_load), logits(compressed(tiny(model_type), **settings)))
    assert at_load.dobisvd_report.coverage >= 0.99
    at_load.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(at_load))


@pytest.mark.parametrize("model_type", MIXTURE_TYPES)
def test_a_dequantized_mixture_is_an_ordinary_one(model_type: str, tmp_path: Path) -> None:
    """With the names and shapes of tensors that its dense checkpoint has, for whoever reads it."""
    dense = tiny(model_type)
    dense.save_pretrained(tmp_path / "dense")
    model = compressed(tiny(model_type))
    model.save_pretrained(tmp_path / "out")
    expected = logits(model)
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        each.dequantize()
        torch.testing.assert_close(logits(each), expected, rtol=1e-4, atol=1e-4)
        assert {name: p.shape for name, p in each.named_parameters()} == {
            name: p.shape for name, p in dense.named_parameters()
        }
        each.save_pretrained(tmp_path / "again")
        found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "dense"))
        assert {name: each.shape for name, each in found.items()} == {
            name: each.shape for name, each in wanted.items()
        }
        ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(logits(ordinary), logits(each))


def test_a_mixture_is_loaded_headless_and_offloaded(tmp_path: Path) -> None:
    model = compressed(tiny("mixtral"))
    model.save_pretrained(tmp_path / "out")
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        body = AutoModel.from_pretrained(tmp_path / "out")(input_ids=ids).last_hidden_state
        assert torch.equal(body, model.model(input_ids=ids).last_hidden_state)
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=OFFLOADED, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(placed), logits(model))


def test_a_mixture_is_converted(tmp_path: Path) -> None:
    compressed(tiny("qwen3_moe")).save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = logits(model)
    convert(model, "int8")
    assert {each.encoding for each in compressed_linears(model).values()} == {"int8"}
    assert float((logits(model) - before).norm() / before.norm()) < 0.1
    model.save_pretrained(tmp_path / "int8")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "int8")), logits(model))
    convert(model, structure="pivoted")
    model.save_pretrained(tmp_path / "pivoted")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "pivoted")), logits(model))


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    compressed(tiny("mixtral")).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    values["num_local_experts"] = 3
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"experts\.3\.\w+, which MixtralForCausalLM does not have"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
