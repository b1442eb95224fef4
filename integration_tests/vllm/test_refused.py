"""What vLLM cannot serve is refused in words, and models that are not compressed are none of the plugin's business."""

import json
import subprocess
import sys

import pytest
import torch

from integration_tests.checkpoint.reloading import compressed
from integration_tests.mixed_checkpoint import mixed_checkpoint
from integration_tests.tiny_models import tiny
from integration_tests.vllm.serving import random_prompts, vllm_process
from optimum_dobisvd.integrations.vllm import checkpoint_config
from optimum_dobisvd.integrations.vllm.checkpoint_config import CheckpointConfig

ENTRY = {"structure": "low_rank", "encoding": "float", "rank": 4}


def config(encoding: str = "float", **values):
    modules = {"model.layers.0.mlp.up_proj": {**ENTRY, "encoding": encoding}}
    return {"quant_method": "dobi_svd", "format_version": 2, "modules": modules, **values}


@pytest.mark.parametrize("encoding", ["gptq4_g32", "nf4", "llm_int8", "remap"])
def test_an_encoding_that_is_not_served_is_named_with_the_matrix(encoding):
    message = rf"up_proj is stored as {encoding}, which is not served by vLLM; float and int8 are. Store .* as int8"
    with pytest.raises(ValueError, match=message):
        CheckpointConfig.from_config(config(encoding))


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0rc1", "1.0"])
def test_a_vllm_that_is_not_supported_is_named(monkeypatch, version):
    monkeypatch.setattr(checkpoint_config.vllm, "__version__", version)
    with pytest.raises(ValueError, match=rf'vLLM {version} is not supported by .*: pip install "vllm==0.32.\*"'):
        CheckpointConfig.from_config(config())


def test_a_config_without_modules_is_refused():
    with pytest.raises(ValueError, match="lists no compressed modules"):
        CheckpointConfig.from_config(config(modules=None))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (
            {"intermediate_size": 161},
            {"tensor_parallel_size": 2},
            "does not divide the model's intermediate_size, 161",
        ),
        ({}, {"tensor_parallel_size": 3}, "attention heads .4. must be divisible by tensor parallel size .3."),
    ],
)
def test_processes_that_cannot_share_the_model_are_refused(tmp_path, sizes, options, message):
    folder = mixed_checkpoint(tmp_path / "mixed", "llama", **sizes)
    done = vllm_process(folder, random_prompts(1), enforce_eager=True, **options)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert __import__("re").search(message, output), output[-3000:]


def test_experts_are_refused_by_name(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 64, "head_dim": 32}
    compressed(tiny("mixtral", dtype=torch.float32, **sizes)).save_pretrained(tmp_path / "moe")
    done = vllm_process(tmp_path / "moe", random_prompts(1), enforce_eager=True)
    assert done.returncode != 0
    assert "experts.0." in done.stderr + done.stdout
    assert "takes no compressed matrices (experts" in done.stderr + done.stdout, (done.stderr + done.stdout)[-3000:]


def test_weights_that_vllm_transposes_are_refused(tmp_path):
    compressed(tiny("gpt2", dtype=torch.float32)).save_pretrained(tmp_path / "gpt2")
    done = vllm_process(tmp_path / "gpt2", random_prompts(1), enforce_eager=True)
    assert done.returncode != 0
    assert "vLLM transposes the weights of gpt2" in done.stderr + done.stdout, (done.stderr + done.stdout)[-3000:]


def test_a_checkpoint_of_two_compressions_is_refused(tmp_path):
    folder = mixed_checkpoint(tmp_path / "mixed", "llama")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["modules"]["model.layers.0.mlp.down_proj"]["rank"] += 1
    (folder / "config.json").write_text(json.dumps(values))
    done = vllm_process(folder, random_prompts(1), enforce_eager=True)
    message = "has shape [13, 160] in the checkpoint and [14, 160] by config.json"
    assert message in done.stderr + done.stdout, (done.stderr + done.stdout)[-3000:]


def test_registering_imports_no_compressor():
    code = (
        "import sys; from optimum_dobisvd.integrations.vllm.plugin import register; register(); register();"
        "print('FOUND', sorted({name.split('.')[1] for name in sys.modules if name.startswith('optimum_dobisvd.')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    assert not {"calibration", "allocation", "pipeline", "statistics", "config", "quantizer"} & set(eval(found[6:]))


def test_the_plugin_is_found_by_its_entry_point():
    from importlib.metadata import entry_points

    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    assert "optimum_dobisvd" in {each.name for each in entry_points(group="vllm.general_plugins")}
    load_general_plugins()
    assert get_quantization_config("dobi_svd") is CheckpointConfig
