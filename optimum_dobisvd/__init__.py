"""Low-rank compression of transformers models: Dobi-SVD, SVD-LLM V2 and relatives.

Importing this registers the quantizer with transformers and costs nothing else; names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from .integrations.autoload import install as _install

__version__ = "0.1.0"

_NAMES = {
    "DobiSVDConfig": "config",
    "DobiSVDQuantizer": "quantizer",
    "load_quantized_model": "quantizer",
    "LowRankLinear": "structures.low_rank",
    "METHODS": "methods",
    "Plan": "allocation.plan",
    "adapter_targets": "integrations.adapter_targets",
    "stable_svd": "factorization.stable_svd",
    "convert": "checkpoint.convert",
    "optimize_for_inference": "inference.optimize",
    "restore_after_inference": "inference.optimize",
}

__all__ = [
    "METHODS",
    "DobiSVDConfig",
    "DobiSVDQuantizer",
    "LowRankLinear",
    "Plan",
    "adapter_targets",
    "convert",
    "load_quantized_model",
    "optimize_for_inference",
    "restore_after_inference",
    "stable_svd",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])


_install()
