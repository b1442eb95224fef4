"""Quantizing linears with bitsandbytes, through transformers' own quantizers; both are imported by name."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn

from .error_feedback import ErrorFeedback


def require_bitsandbytes() -> None:
    """Raise ImportError, naming the extra, if bitsandbytes is not installed or does not work."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("this needs bitsandbytes: pip install 'optimum-dobisvd[bnb]'")
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:
        raise ImportError(f"bitsandbytes is installed and cannot be imported: {error}") from error


def hf_quantizer_of(settings: Any, pre_quantized: bool) -> Any:
    """Return transformers' quantizer for a `BitsAndBytesConfig`."""
    # Imported here, because with it come the quantizers of all other libraries, which takes seconds.
    return importlib.import_module("transformers.quantizers.auto").AutoHfQuantizer.from_config(
        settings, pre_quantized=pre_quantized
    )


def quantized_linear(linear: nn.Linear, settings: Any, dtype: torch.dtype) -> Any:
    """Return bitsandbytes' linear of the same function, but for the rounding of each value.

    It remembers `dtype`, the model's, as that of the weight, which may be a wider one here.
    """
    holder: Any = _Holder(linear)
    put_empty_linears(holder, settings, pre_quantized=False)
    new = holder.linear
    operation = hf_quantizer_of(settings, pre_quantized=False).get_quantize_ops()
    found = operation.convert(
        {"linear.weight": [linear.weight.data.to(dtype)]}, model=holder, full_layer_name="linear.weight"
    )
    new.weight = found["linear.weight"]
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    keep_as_saved(new)
    return new.train(linear.training)


def dequantized_weight(linear: Any) -> Tensor:
    """Return the matrix that one of bitsandbytes' linears stands for (`m x n`), before its first forward pass."""
    functional, weight = importlib.import_module("bitsandbytes.functional"), linear.weight
    if hasattr(weight, "quant_state"):
        return cast(Tensor, functional.dequantize_4bit(weight.data, weight.quant_state))
    return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, weight.SCB))


def round_with_feedback(linear: nn.Linear, settings: Any, gram: Tensor, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Return bitsandbytes' 4-bit linear with values rounded by error feedback, and the matrix it stands for.

    bitsandbytes takes the largest value of a block for its scale and rounds every value on its own. Here scales are
    fitted, and `ErrorFeedback` chooses which value of its code a weight becomes. The tensors are bitsandbytes' own in
    every respect.
    """
    new = quantized_linear(linear, settings, dtype)
    state = new.weight.quant_state
    matrix = linear.weight.detach()
    code, ascending = state.code.double().sort()
    feedback = ErrorFeedback(gram)
    fitted = feedback.fitted_scales(matrix, code, scales_of(state).view(len(matrix), -1).to(matrix.device))
    set_scales(state, fitted.flatten().to(state.code))
    chosen, rounded = feedback.round(matrix, code, scales_of(state).view_as(fitted).to(matrix.device))
    set_codes(new, ascending[chosen])
    return new, rounded


def set_codes(linear: Any, codes: Tensor) -> None:
    """Give one of bitsandbytes' 4-bit linears its codes (whole numbers from 0 to 15, `m x n`)."""
    values = codes.to(torch.uint8).view(-1, 2)
    # Two to a byte, the first one in the upper half.
    linear.weight.data = (values[:, 0] << 4 | values[:, 1]).view_as(linear.weight.data)


def put_empty_linears(module: nn.Module, settings: Any, *, pre_quantized: bool) -> None:
    """Put bitsandbytes' linears on meta in the place of a module's plain ones."""
    replace = importlib.import_module("transformers.integrations").replace_with_bnb_linear
    replace(module, quantization_config=settings, pre_quantized=pre_quantized)


def keep_as_saved(module: nn.Module) -> None:
    """Keep a 4-bit linear from repacking itself in its first forward pass on a CPU with bf16 instructions.

    That takes multiples of 32 outputs only, rounds the scales to bfloat16, and the rounded ones would then be saved.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - a type checker takes it for a tensor


def scales_of(state: Any) -> Tensor:
    """Return the scale of every block, float32, from what bitsandbytes keeps of a 4-bit weight."""
    if not state.nested:
        return cast(Tensor, state.absmax)
    functional = importlib.import_module("bitsandbytes.functional")
    return cast(Tensor, functional.dequantize_blockwise(state.absmax, state.state2) + state.offset)


def set_scales(state: Any, scales: Tensor) -> None:
    """Store scales as bitsandbytes does, which for double quantization is as near as 8 bits come."""
    if not state.nested:
        state.absmax = scales
        return
    functional = importlib.import_module("bitsandbytes.functional")
    state.offset = scales.mean()
    state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, blocksize=state.state2.blocksize)


class _Holder(nn.Module):
    """A model of one linear, as far as transformers' operations ask."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        return self.get_parameter(name)
