"""Tiny models whose matrices have a format, and what they compute."""

from typing import Any

import torch

from integration_tests.quantization.quantized_models import wide
from integration_tests.tiny_models import tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, Plan
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.inference.shared_input import SharedInput
from optimum_dobisvd.model.layout import find_layout

IDS = tokens(2, 12)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_RANKS = {"float": 24, "int8": 32, "remap": 32, "gptq4_g32": 32, "gptq3_g32": 32, "nf4": 64}


def compressed(
    structure: str,
    encoding: str,
    dtype: torch.dtype = torch.float32,
    model: Any = None,
    rank: int | None = None,
    **kinds: str,
) -> Any:
    """A model whose matrices all have that format, but for those whose names end like one of `kinds`."""
    largest = rank or _RANKS[encoding]
    model = wide("llama", dtype) if model is None else model
    modules = {}
    for target in find_layout(model).targets:
        own = kinds.get(target.name.rpartition(".")[2], structure)
        rank = None if own == "dense" else min(largest, min(target.out_features, target.in_features) // 2)
        planned = PlannedModule(own, encoding, rank)
        fits = planned.format.unsupported_reason(target.out_features, target.in_features, rank) is None
        modules[target.name] = planned if fits else PlannedModule("dense", encoding)
    plan = Plan(modules, method="output_pca", ratio=None, allocation="by hand")
    quantization = None if encoding == "float" else encoding
    config = DobiSVDConfig(method="output_pca", dataset=tokens(6, 24), plan=plan, quantization=quantization)
    return DobiSVDQuantizer(config).quantize_model(model)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of a model, float32."""
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def generated(model: Any, **settings: Any) -> torch.Tensor:
    """Ten tokens, greedily."""
    mask = torch.ones_like(IDS)
    return model.generate(
        IDS, attention_mask=mask, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=1, **settings
    )


def joined(model: Any) -> int:
    """How many products take the place of several."""
    return sum(isinstance(module, SharedInput) for module in model.modules())


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, encoding: str = "float") -> None:
    """Within what the dtype rounds."""
    # gptqmodel's kernel unpacks to float16, whatever it computes in.
    tolerance = max(TOLERANCES[dtype], 2e-3) if encoding.startswith("gptq") else TOLERANCES[dtype]
    assert float((found - expected).norm() / expected.norm()) < tolerance
