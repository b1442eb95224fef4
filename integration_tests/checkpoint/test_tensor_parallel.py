"""Two processes that share a compressed model (`tp_plan="auto"`) compute what one does; gradients, too."""

import json
import socket
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

from integration_tests.checkpoint.reloading import compressed
from integration_tests.fresh_processes import run_python
from integration_tests.mixed_checkpoint import mixed_checkpoint
from integration_tests.tiny_models import tiny

pytestmark = pytest.mark.skipif(
    not hasattr(HfQuantizer, "update_parallel_plan") or not torch.distributed.is_available(),
    reason="this transformers asks no quantizer to update plans",
)
SHARED = """
import json, os, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")
)
ids = torch.arange(2, 26).view(2, 12)
with torch.no_grad():
    found = {"logits": model(input_ids=ids).logits}
model(input_ids=ids, labels=ids).loss.backward()
here = {}
for name, parameter in model.named_parameters():
    whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    here[name] = local.numel() / parameter.numel()
    if parameter.grad is not None:
        found[name] = whole(parameter.grad)
for folder in sys.argv[3:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
    except ValueError as error:
        print("REFUSED", error)
if os.environ["RANK"] == "0":
    print("SHARES", json.dumps(here))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, sys.argv[2])
torch.distributed.destroy_process_group()
"""


def in_two_processes(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program above as two processes of one group; what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    code = f"""
import os, subprocess, sys
ranks = [
    subprocess.Popen([sys.executable, "-c", {SHARED!r}, *sys.argv[1:]],
                     env=dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank)))
    for rank in range(2)
]
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return run_python(code, *arguments, **group)


def test_two_processes_compute_what_one_does_and_what_cannot_be_shared_out_is_named(tmp_path):
    folder = mixed_checkpoint(tmp_path / "mixed", "qwen2")  # with biases
    compressed(tiny("llama"), quantization="remap", ratio=0.5).save_pretrained(tmp_path / "remap")
    compressed(tiny("mixtral")).save_pretrained(tmp_path / "experts")
    refused = (str(tmp_path / "remap"), str(tmp_path / "experts"))
    done = in_two_processes(str(folder), str(tmp_path / "found.safetensors"), *refused)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(found.pop("logits"), model(input_ids=ids).logits, atol=5e-5, rtol=1e-4)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)

    shares = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("SHARES "))[7:])
    assert shares["model.layers.0.self_attn.q_proj.first.weight"] == 1  # low rank, outputs shared out
    assert shares["model.layers.0.self_attn.q_proj.second.weight"] == 0.5
    assert shares["model.layers.0.self_attn.o_proj.first.weight"] == 0.5  # int8, inputs shared out
    assert shares["model.layers.0.self_attn.o_proj.first.scale"] == 1
    assert shares["model.layers.0.self_attn.o_proj.second.weight"] == 1
    assert shares["model.layers.0.mlp.up_proj.linear.scale"] == 0.5

    for what in (
        "q_proj is stored as remap, which tensor parallelism",
        "experts holds compressed experts, which tensor",
    ):
        told = [line for line in done.stdout.splitlines() if line.startswith("REFUSED") and what in line]
        assert sum("without tp_plan" in line for line in told) == 2, done.stdout
