"""Small models whose matrices GPTQ and bitsandbytes store: their settings, and a compression to given encodings."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig, BitsAndBytesConfig, GPTQConfig

from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.model.layout import find_layout

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 2}
"""Wide enough for groups of 32 and blocks of 64."""
needs_gptq = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)

SETTINGS = {
    "gptq": lambda: GPTQConfig(bits=4, group_size=32),
    "gptq_desc_act": lambda: GPTQConfig(bits=4, group_size=32, desc_act=True, true_sequential=False),
    "autoround": lambda: AutoRoundConfig(bits=4, group_size=32, sym=False, iters=2),
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4_dq": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "llm_int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
}
ENCODINGS: dict[str, list[tuple[str, int | None]]] = {
    "gptq": [("gptq4_g32", 32), ("gptq4_g32", None), ("gptq3_g32", 32), ("gptq2_g32", None), ("int8", 16)],
    "gptq_desc_act": [("gptq8_g32", 32), ("gptq4_g32", None), ("float", 7)],
    "autoround": [("gptq4_g32", 32), ("gptq4_g32", None), ("gptq3_g32", 32), ("gptq2_g32", None), ("int8", 16)],
    "nf4": [("nf4", 64), ("nf4", None), ("float", 9), ("int8", None)],
    "nf4_dq": [("nf4_dq", 64), ("nf4_dq", None), ("float", None)],
    "fp4": [("fp4", 64), ("fp4", None)],
    "llm_int8": [("llm_int8", 17), ("llm_int8", None), ("int8", 16)],
}
"""What matrices become by turns: encodings of the settings and of our own, at which rank (None: not factorized)."""


_BY_GPTQ = ("gptq", "gptq_desc_act", "autoround")


def marked(*keys: str) -> list[Any]:
    """Those settings as parameters of a test, each skipped where its library is missing."""
    return [
        pytest.param(key, marks=needs_gptq if key.startswith(("gptq", "autoround")) else needs_bnb) for key in keys
    ]


def wide(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of that architecture, wide enough for every encoding."""
    return tiny(name, dtype=dtype, **WIDE)


def planned(model: Any, encodings: list[tuple[str, int | None]]) -> Plan:
    """A plan that gives the matrices of a model these encodings and ranks by turns.

    A rank is of `low_rank` the first time, of `pivoted` the second, and so on, where the matrix has rows enough.
    """
    modules = {}
    for number, target in enumerate(find_layout(model).targets):
        turn, place = divmod(number, len(encodings))
        encoding, rank = encodings[place]
        modules[target.name] = PlannedModule("dense", encoding)
        if rank is not None:
            rank = min(rank, target.out_features)
            pivoted = PlannedModule("pivoted", encoding, rank)
            fits = pivoted.format.unsupported_reason(target.out_features, target.in_features, rank) is None
            modules[target.name] = pivoted if turn % 2 and fits else PlannedModule("low_rank", encoding, rank)
    return Plan(modules, method="output_pca", ratio=None, allocation="by hand")


def quantized(folder: Path, key: str, dtype: torch.dtype, **placement: Any) -> Any:
    """The dense model in a folder, compressed and quantized in one `from_pretrained`."""
    plan = planned(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), ENCODINGS[key])
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan, quantization=SETTINGS[key]())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, **placement)


def encodings_of(key: str) -> set[str]:
    """The names that compressed linears have with those settings: matrices left as they are are none."""
    return {encoding for encoding, rank in ENCODINGS[key] if (encoding, rank) != ("float", None)}
