"""What can be refused about a dense model before calibration."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .allocation.patterns import resolve_overrides
from .calibration.layout import Layout, find_layout
from .config import DobiSVDConfig
from .nn.dense_linear import weight_matrix
from .report.report import is_compressed

logger = logging.getLogger(__name__)


def check_model(model: Any, config: DobiSVDConfig) -> Layout:
    """Everything about a dense model that can be refused before calibration; returns its layout.

    Raises:
        ValueError: already compressed; no eligible linear; coverage; patterns or overrides that match nothing; NaN or
            infinite weights (names the module).
    """
    if is_compressed(model):
        raise ValueError("the model is compressed already; load the dense model to compress it differently")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "the model has adapters (PEFT); merge them (merge_and_unload) or take them off before compressing"
        )
    method = config.resolved_method()
    if (method.needs_gradients or method.learns) and not _has_head(model):
        raise ValueError(
            f"{type(model).__name__} gives no next-token logits, and method {config.method!r} weighs matrices by the "
            "next-token loss: load it as a causal language model, or choose a method that reads no gradients "
            "(svd_llm_v2)"
        )
    layout = find_layout(model, config.modules_to_not_convert, config.min_coverage)
    resolve_overrides(config.overrides, list(layout.linears))
    for name, module in layout.linears.items():
        weight = weight_matrix(module)
        if weight.device.type != "meta" and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{name}.weight has NaN or infinite values; the checkpoint is damaged, or its dtype too small"
            )
    if method.needs_gradients and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} was loaded under torch.inference_mode, so no gradient can be taken through it, "
            f"and method {config.method!r} needs some: load it outside, or choose a method that reads no gradients"
        )
    if layout.left_dense:
        logger.info("left dense: %s", layout.describe_left_dense())
    return layout


def _has_head(model: Any) -> bool:
    """Whether the model has a language model's head, as far as it says."""
    head_of = getattr(model, "get_output_embeddings", None)
    return head_of is None or head_of() is not None
