"""Linears in bitsandbytes' forms, through transformers' own quantizers.

Bundled with every checkpoint (see `saving.modeling_source`), so bitsandbytes is imported by name, not by statement.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig

from ..nn.compressed_linear import CompressedLinear
from ..storage.inner_forms import gptq_bits_of, inner_form_named


def require_bitsandbytes() -> None:
    """ImportError, naming the extra, if bitsandbytes is not installed or does not work."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("this needs bitsandbytes: pip install 'optimum-dobisvd[bnb]'")
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:
        raise ImportError(f"bitsandbytes is installed and cannot be imported: {error}") from error


def is_bnb_form(storage: str) -> bool:
    """Whether a storage is one of bitsandbytes' forms."""
    return inner_form_named(storage) is not None and gptq_bits_of(storage) is None


def empty_bnb_children(shell: CompressedLinear, inner: BitsAndBytesConfig) -> None:
    """bitsandbytes' linears on meta in the place of a shell's plain ones, to load quantized weights into."""
    from transformers.integrations import replace_with_bnb_linear

    replace_with_bnb_linear(shell, quantization_config=inner, pre_quantized=True)


def bnb_tensors(storage: str, name: str, out_features: int, in_features: int) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of the weight of one linear as it lies in a checkpoint, and of its scales."""
    if storage == "llm_int8":
        return {f"{name}.weight": ([out_features, in_features], "I8"), f"{name}.SCB": ([out_features], "F32")}
    count = out_features * in_features
    nested = storage.endswith("_dq")
    return {
        f"{name}.weight": ([-(-count // 2), 1], "U8"),
        f"{name}.weight.absmax": ([-(-count // 64)], "U8" if nested else "F32"),
    }


def bnb_quantizer(inner: Any) -> Any:
    """transformers' quantizer that reads such weights."""
    from transformers.quantizers.auto import AutoHfQuantizer

    return AutoHfQuantizer.from_config(inner, pre_quantized=True)


def mark_loaded(model: Any, inner: BitsAndBytesConfig) -> None:
    """What peft and transformers' Trainer ask of a model whose linears are bitsandbytes'."""
    for module in model.modules():
        keep_as_saved(module)
    setattr(model, "is_loaded_in_8bit" if inner.load_in_8bit else "is_loaded_in_4bit", True)


def keep_as_saved(module: nn.Module) -> None:
    """Keep a 4-bit linear from repacking itself in its first forward pass on a CPU with bf16 instructions.

    That takes multiples of 32 outputs only, rounds the scales to bfloat16, and the rounded ones would then be saved.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - a type checker takes it for a tensor


def restore_biases(model: nn.Module) -> None:
    """Biases of bitsandbytes' linears in their model's dtype again: every pass casts them to what it computes in."""
    for shell in model.modules():
        if isinstance(shell, CompressedLinear) and is_bnb_form(shell.storage) and shell.bias is not None:
            shell.bias.data = shell.bias.data.to(shell.weight.dtype)


def unmark(model: Any) -> None:
    """A dense model again, which may be cast."""
    for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "quantization_method"):
        model.__dict__.pop(name, None)
