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
    """bitsandbytes' linears on meta in the place of a shell's plain ones, to load quantised weights into."""
    from transformers.integrations import replace_with_bnb_linear

    replace_with_bnb_linear(shell, quantization_config=inner, pre_quantized=True)


def quantize_bnb(model: nn.Module, inner: BitsAndBytesConfig) -> None:
    """Quantise the linears inside every shell whose storage is one of bitsandbytes' forms, in place.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: naming the shell whose weights are offloaded.
    """
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer

    require_bitsandbytes()
    operation = AutoHfQuantizer.from_config(inner, pre_quantized=False).get_quantize_ops()
    for name, shell in model.named_modules():
        if not isinstance(shell, CompressedLinear) or not is_bnb_form(shell.storage):
            continue
        plain = {child: module for child, module in shell.named_children() if type(module) is nn.Linear}
        if any(module.weight.device.type == "meta" for module in plain.values()):
            raise ValueError(
                f"{name} is offloaded, and bitsandbytes quantises only what is in memory: load the model without cpu "
                "or disk offload to quantise it"
            )
        replace_with_bnb_linear(shell, quantization_config=inner, pre_quantized=False)
        for child, module in plain.items():
            new: Any = shell.get_submodule(child)
            key = f"{name}.{child}.weight"
            new.weight = operation.convert({key: module.weight.data}, model=model, full_layer_name=key)[key]
            if module.bias is not None:
                new.bias = nn.Parameter(module.bias.data, requires_grad=False)
            new.train(module.training)


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
    """What peft and transformers' Trainer ask of a model whose linears are bitsandbytes'.

    And on CPUs with bf16 instructions, 4-bit linears are kept from repacking themselves in their first forward pass:
    that takes multiples of 32 outputs only, rounds the scales to bfloat16, and the rounded ones would then be saved.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    setattr(model, "is_loaded_in_8bit" if inner.load_in_8bit else "is_loaded_in_4bit", True)


def unmark(model: Any) -> None:
    """A dense model again."""
    for name in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
        model.__dict__.pop(name, None)
