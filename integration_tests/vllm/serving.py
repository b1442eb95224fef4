"""What transformers and vLLM generate from a checkpoint."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from integration_tests.mixed_checkpoint import VOCABULARY

MAX_TOKENS = 16


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
