"""A random model whose matrices are in every structure and encoding."""

import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.model.layout import find_layout

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
