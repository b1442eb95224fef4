"""Tiny compressed models, and what they compute when another process has reloaded them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from integration_tests.fresh_processes import run_python
from integration_tests.tiny_models import tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer

OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
"""A device map of a tiny Llama, of which nothing stays in memory."""

LOAD_ALL = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for path, out in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        save_file({"logits": model(input_ids=torch.arange(2, 26).view(2, 12)).logits.contiguous()}, out)
"""


def compressed(model: Any, **config: Any) -> Any:
    """The model after a compression on random tokens, by `output_pca` to 0.6 unless the config says otherwise."""
    settings = {"method": "output_pca", "ratio": 0.6, "dataset": tokens(6, 24), **config}
    return DobiSVDQuantizer(DobiSVDConfig(**settings)).quantize_model(model)


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """What it computes for those tokens, by default the ones that `LOAD_ALL` gives it."""
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 26).view(2, 12) if ids is None else ids).logits


def assert_reloaded_alike(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """The checkpoints of these names give these logits in a process that never imports the plugin."""
    jobs = [(str(folder / name), str(folder / f"{name}.safetensors")) for name in expected]
    done = run_python(LOAD_ALL, json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MISSING" not in done.stderr
    assert "UNEXPECTED" not in done.stderr
    for name, wanted in expected.items():
        found = load_file(folder / f"{name}.safetensors")["logits"]
        assert found.dtype == wanted.dtype, name
        assert torch.equal(found, wanted), name
