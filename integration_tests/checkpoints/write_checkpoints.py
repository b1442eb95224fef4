"""Writes the checkpoints of this folder: every structure x encoding of a model with biases, with Conv1D, and tied.

    python -m integration_tests.checkpoints.write_checkpoints

`test_read_forever.py` reloads them. From the first release on they are never written again, since they stand for what
users have on their disks: a new structure or encoding gets new ones beside them, and a change that this script would
write differently has to read the old ones all the same. Folders that are there already are left alone.

`expected.json` has the sha256 of the matrix that each linear of each compressed matrix stands for, and some logits.
The loader that every checkpoint carries is there once, in the file beside the folders of its time. What came later is
in a folder of its own, with the loader of then: `pivoted/`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig

from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.checkpoint.bundle import MODELING_FILE
from optimum_dobisvd.model.layout import find_layout

HERE = Path(__file__).parent
IDS = tokens(2, 9, vocab_size=32)

_LLAMA = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
MODELS = {
    "bias": ("qwen2", {**_LLAMA, "tie_word_embeddings": False}),
    "tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "conv1d": ("gpt2", {"vocab_size": 32, "n_embd": 64, "n_inner": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    # Biases, and more rows than 4 bits take for pivots.
    "wide": ("qwen2", {**_LLAMA, "head_dim": 64, "num_key_value_heads": 1, "intermediate_size": 32}),
}

_GPTQ = {"group_size": 32, "sym": False, "desc_act": True, "act_group_aware": False}
_FOUR_BITS: dict[str, Any] = {"load_in_4bit": True}
# What `quantization` is, and what matrices become in turn: structure, encoding, rank.
KINDS: dict[str, tuple[Any, list[tuple[str, str, int | None]]]] = {
    "ours": (
        None,
        [
            ("low_rank", "float", 13),
            ("low_rank", "int8", 16),
            ("dense", "int8", None),
            ("dense", "float", None),
            ("low_rank", "remap", 17),
            ("dense", "remap", None),
            ("low_rank", "int8", 21),
        ],
    ),
    "gptq": (
        GPTQConfig(bits=4, **_GPTQ),
        [
            ("low_rank", "gptq4_g32", 32),
            ("dense", "gptq4_g32", None),
            ("dense", "gptq3_g32", None),
            ("dense", "gptq2_g32", None),
            ("dense", "gptq8_g32", None),
            ("low_rank", "gptq8_g32", 32),
            ("low_rank", "gptq3_g32", 32),
        ],
    ),
    "nf4": (
        BitsAndBytesConfig(**_FOUR_BITS, bnb_4bit_quant_type="nf4"),
        [("dense", "nf4", None), ("low_rank", "nf4", 64)],
    ),
    "nf4_dq": (
        BitsAndBytesConfig(**_FOUR_BITS, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        [("dense", "nf4_dq", None), ("low_rank", "nf4_dq", 64)],
    ),
    "fp4": (
        BitsAndBytesConfig(**_FOUR_BITS, bnb_4bit_quant_type="fp4"),
        [("dense", "fp4", None), ("low_rank", "fp4", 64)],
    ),
    "llm_int8": (
        BitsAndBytesConfig(load_in_8bit=True),
        [("dense", "llm_int8", None), ("low_rank", "llm_int8", 19)],
    ),
    "pivoted/ours": (None, [("pivoted", "float", 13), ("pivoted", "int8", 9)]),
    "pivoted/gptq": (
        GPTQConfig(bits=4, **_GPTQ),
        [("pivoted", f"gptq{bits}_g32", 32) for bits in (4, 3, 2, 8)],
    ),
    "pivoted/nf4": (BitsAndBytesConfig(**_FOUR_BITS, bnb_4bit_quant_type="nf4"), [("pivoted", "nf4", 64)]),
    "pivoted/nf4_dq": (
        BitsAndBytesConfig(**_FOUR_BITS, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        [("pivoted", "nf4_dq", 64)],
    ),
    "pivoted/fp4": (BitsAndBytesConfig(**_FOUR_BITS, bnb_4bit_quant_type="fp4"), [("pivoted", "fp4", 64)]),
    "pivoted/llm_int8": (BitsAndBytesConfig(load_in_8bit=True), [("pivoted", "llm_int8", 7)]),
}


def models_of(kind: str) -> tuple[str, ...]:
    """The models that are written of a kind: where only the children's encoding is new, one."""
    return ("wide",) if kind.startswith("pivoted/") and kind != "pivoted/ours" else ("bias", "tied", "conv1d")


def write(kind: str, model_name: str, folder: Path) -> None:
    """Compress a tiny model by hand, in bfloat16, and save it with what it has to give."""
    architecture, overrides = MODELS[model_name]
    quantization, formats = KINDS[kind]
    if model_name == "conv1d" and len(formats) < 4:
        overrides = {**overrides, "n_layer": 1}
    with tempfile.TemporaryDirectory() as scratch:
        tiny(architecture, **overrides).to(torch.bfloat16).save_pretrained(scratch)
        dense = AutoModelForCausalLM.from_pretrained(scratch)
        targets = find_layout(dense).targets
        modules = {
            target.name: _planned(target, formats[number % len(formats)]) for number, target in enumerate(targets)
        }
        plan = Plan(modules, method="output_pca", ratio=None, allocation="by hand")
        config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24, vocab_size=32), plan=plan)
        config.quantization = quantization
        model = AutoModelForCausalLM.from_pretrained(scratch, quantization_config=config)
        model.save_pretrained(folder)
    described = ("config.json", "model.safetensors")
    if not (folder.parent / MODELING_FILE).exists():
        (folder / MODELING_FILE).replace(folder.parent / MODELING_FILE)
    for path in folder.iterdir():
        if path.name not in described:
            path.unlink()
    again = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "expected.json").write_text(json.dumps(expected_of(again), indent=1) + "\n", encoding="utf-8")


def _planned(target: Any, entry: tuple[str, str, int | None]) -> PlannedModule:
    """What a matrix becomes: whole where it has no more rows than there would be pivots."""
    for module in (PlannedModule(*entry), PlannedModule("dense", entry[1])):
        if module.format.unsupported_reason(target.out_features, target.in_features, module.rank) is None:
            return module
    return PlannedModule("dense", "float")


def expected_of(model: Any) -> dict[str, Any]:
    """sha256 of what every linear of every compressed matrix computes with, and the logits of some tokens."""
    matrices = {
        f"{name}.{child}": hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest()
        for name, module in model.named_modules()
        if hasattr(module, "matrices")
        for child, matrix in module.matrices().items()
    }
    with torch.no_grad():
        logits = model(input_ids=IDS).logits.float()
    return {"matrices": matrices, "logits": [[round(value, 3) for value in row] for row in logits[:, -1].tolist()]}


def main() -> None:
    for kind in KINDS:
        for model_name in models_of(kind):
            folder = HERE / f"{kind}-{model_name}"
            if not folder.exists():
                write(kind, model_name, folder)


if __name__ == "__main__":
    main()
