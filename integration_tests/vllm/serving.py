"""Random models with matrices in every structure and encoding, and what transformers and vLLM make of them."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.model.layout import find_layout

MAX_TOKENS = 16
VOCABULARY = 320
# Heads of 32, which is the least that vLLM's attention takes on a CPU.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_FORMATS = [
    ("low_rank", "float", 13),
    ("pivoted", "float", 17),
    ("dense", "float", None),
    ("low_rank", "int8", 16),
    ("pivoted", "int8", 32),
    ("dense", "int8", None),
]
# In every other block q, k and v (gate and up) are alike, so that all their first linears are one product.
_ALIKE = [("pivoted", "float", 21), ("low_rank", "int8", 16), ("dense", "int8", None)]


def mixed_checkpoint(folder: Path, architecture: str, **sizes: Any) -> Path:
    """Save a random model, of which every matrix is in the next of all formats, those of every other block in one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**_SIZES, **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 or name.endswith("bias"):
            torch.nn.init.normal_(parameter.data, std=0.15)  # decided, or two tokens would be as likely as each other
    targets = [target.name for target in find_layout(model).targets]
    following = itertools.cycle(_FORMATS)
    alike = itertools.cycle(_ALIKE)
    modules = {}
    for block, names in itertools.groupby(targets, key=lambda name: name.split(".layers.")[1].split(".")[0]):
        same = next(alike) if int(block) % 2 else None
        modules |= {name: PlannedModule(*(same or next(following))) for name in names}
    plan = Plan(modules, method="svd", ratio=None, allocation="given")
    settings = DobiSVDConfig(method="svd", plan=plan, quantization="int8")
    DobiSVDQuantizer(settings).quantize_model(model).save_pretrained(folder)
    return folder


def random_prompts(count: int = 20) -> list[list[int]]:
    """Token ids of prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (3 + index,), generator=generator).tolist() for index in range(count)]


def transformers_tokens(folder: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return what transformers generates greedily, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # one token as any other, as it is for vLLM with ignore_eos
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        asked = {"max_new_tokens": MAX_TOKENS, "do_sample": False, "pad_token_id": 0}
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **asked)[0, len(prompt) :].tolist())
    return found


def vllm_process(
    folder: Path, prompts: Sequence[Sequence[int]], environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Have vLLM generate in a process of its own; returns it, with its output as text."""
    file = folder.with_name(f"{folder.name}-prompts.json")
    file.write_text(json.dumps(prompts))
    asked = json.dumps({"max_tokens": MAX_TOKENS, **options})
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("generate.py")), str(folder), str(file), asked],
        env={**os.environ, **small, "HF_HUB_OFFLINE": "1", **(environment or {})},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=1500,
    )


def vllm_tokens(
    folder: Path, prompts: Sequence[Sequence[int]], environment: dict[str, str] | None = None, **options: Any
) -> list[list[int]]:
    """Return what vLLM generates greedily."""
    done = vllm_process(folder, prompts, environment, **options)
    line = next((line for line in done.stdout.splitlines() if line.startswith("TOKENS ")), None)
    assert line is not None, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    found: list[list[int]] = json.loads(line.removeprefix("TOKENS "))
    return found
