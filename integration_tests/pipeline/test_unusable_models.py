"""Models and settings that cannot be worked with: one sentence each that says what to pass instead."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from integration_tests.fresh_processes import run_python
from integration_tests.pipeline.tiny_model_compression import compress, refused
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer


def quantize(model: Any, **settings: Any) -> Any:
    config = DobiSVDConfig(**{"method": "svd_llm", "ratio": 0.7, "dataset": tokens(4, 16), **settings})
    return DobiSVDQuantizer(config).quantize_model(model)


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the OptimizedModule is compiled \(torch.compile\): pass model._orig_mod"):
        quantize(torch.compile(tiny("llama")))
    model = tiny("llama")
    model.compile()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is compiled in place \(module.compile\(\)\): load it"):
        quantize(model)
    model = tiny("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1])
    with pytest.raises(ValueError, match=r"its module model\.layers\.1 is compiled"):
        quantize(model)


def test_a_model_in_a_parallel_wrapper_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the DataParallel is wrapped in DataParallel: pass its \.module"):
        quantize(nn.DataParallel(tiny("llama")))


SHARDED = """
import sys, torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
device = torch.device("cpu")
mesh = distributed.init_device_mesh("cpu", (1,))
wrappers = {
    "parallel": DistributedDataParallel,
    "fsdp": lambda model: FullyShardedDataParallel(model, device_id=device),
    "fsdp2": lambda model: fully_shard(model, mesh=mesh),
}
for name, wrap in wrappers.items():
    model = wrap(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
    try:
        DobiSVDQuantizer(DobiSVDConfig(method="svd", ratio=0.6)).quantize_model(model)
    except ValueError as error:
        print(name, error)
"""


def test_models_of_several_processes_are_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "dense")
    done = run_python(SHARDED, str(tmp_path / "dense"), str(tmp_path / "meeting"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "parallel the DistributedDataParallel is wrapped in DistributedDataParallel: pass its .module, and wrap the "
        "compressed one",
        "fsdp the FullyShardedDataParallel is sharded (FSDP): compress the model before it is wrapped",
        "fsdp2 model.embed_tokens.weight is sharded over processes (a DTensor): compress the model before it is "
        "sharded",
    ]


def test_weights_of_another_quantization_are_named() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny("llama", hidden_size=64, intermediate_size=64)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(
        ValueError, match=r"q_proj\.weight is a \w+, not a plain tensor: torchao has quantized it; load"
    ):
        quantize(model)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.bias", "model.layers.0.input_layernorm.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_every_parameter_that_is_not_finite_is_named(name: str, value: float) -> None:
    model = tiny("qwen2")
    model.get_parameter(name).data[3] = value
    with pytest.raises(ValueError, match=f"{name} has NaN or infinite values"):
        quantize(model)


def test_a_device_that_is_not_there_is_refused() -> None:
    missing = "cuda" if not torch.cuda.is_available() else "cuda:99"
    for name in (missing, "gpu"):
        with pytest.raises(ValueError, match=f"device='{name}' cannot be used: .*; this machine has: cpu"):
            quantize(tiny("llama"), device=name)


def test_a_single_name_may_be_left_alone() -> None:
    model = quantize(tiny("llama"), modules_to_not_convert="q_proj")
    assert model.config.quantization_config.modules_to_not_convert == ["q_proj"]
    assert not [name for name in model.config.quantization_config.modules if "q_proj" in name]


@pytest.mark.parametrize("model_type", ["llama", "llama_tied", "gpt_neox"])
def test_everyones_habit_changes_nothing(model_type: str) -> None:
    left = ["lm_head"]
    one, other = (quantize(tiny(model_type), modules_to_not_convert=names) for names in (left, []))
    assert one.config.quantization_config.modules == other.config.quantization_config.modules
    quantize(tiny("llama"), modules_to_not_convert=["model.norm", "embed_tokens"])
    refused(tiny("llama"), "'lm_haed' matches no module; near names: 'lm_head'", modules_to_not_convert=["lm_haed"])
    assert compress(tiny("llama")).plan is not None
