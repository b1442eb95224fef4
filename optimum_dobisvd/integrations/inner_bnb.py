"""Quantizing linears with bitsandbytes, through transformers' own quantizers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.auto import AutoHfQuantizer

from ..factorization.feedback import ErrorFeedback
from ..nn.compressed_linear import CompressedLinear
from .bnb_linear import is_bnb_form, keep_as_saved, require_bitsandbytes


class BnbRounder:
    """Puts bitsandbytes' 4-bit linears in the place of plain ones, their values rounded with error feedback.

    bitsandbytes takes the largest value of a block for its scale and rounds every value on its own. Here scales are
    fitted, and `ErrorFeedback` chooses which value of its code a weight becomes. The tensors are bitsandbytes' own in
    every respect.

    Args:
        inner: a `BitsAndBytesConfig` of 4 bits.
    """

    def __init__(self, inner: BitsAndBytesConfig) -> None:
        require_bitsandbytes()
        self._inner = inner
        self._operation = AutoHfQuantizer.from_config(inner, pre_quantized=False).get_quantize_ops()

    def takes(self, storage: str) -> bool:
        """Whether a shell of that storage is bitsandbytes' business."""
        return is_bnb_form(storage)

    def round(self, linear: Any, gram: Tensor, storage: str) -> tuple[nn.Module, Tensor]:
        """The quantized linear, and the matrix it stands for, `m x n`."""
        new = quantized_alike(linear, self._inner, self._operation)
        state = new.weight.quant_state
        matrix = linear.weight.detach()
        code, ascending = state.code.double().sort()
        feedback = ErrorFeedback(gram)
        fitted = feedback.fitted_scales(matrix, code, _scales(state).view(len(matrix), -1).to(matrix.device))
        _set_scales(state, fitted.flatten().to(state.code))
        chosen, rounded = feedback.round(matrix, code, _scales(state).view_as(fitted).to(matrix.device))
        values = ascending[chosen].to(torch.uint8).view(-1, 2)
        # Two to a byte, the first one in the upper half.
        new.weight.data = (values[:, 0] << 4 | values[:, 1]).view_as(new.weight.data)
        return new, rounded


def _scales(state: Any) -> Tensor:
    """One for every block, float32."""
    if not state.nested:
        return cast(Tensor, state.absmax)
    from bitsandbytes.functional import dequantize_blockwise

    return cast(Tensor, dequantize_blockwise(state.absmax, state.state2) + state.offset)


def _set_scales(state: Any, scales: Tensor) -> None:
    """As bitsandbytes stores them, which for double quantization is as near as 8 bits come."""
    if not state.nested:
        state.absmax = scales
        return
    from bitsandbytes.functional import quantize_blockwise

    state.offset = scales.mean()
    state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=state.state2.blocksize)


def quantize_bnb(model: nn.Module, inner: BitsAndBytesConfig) -> None:
    """Quantize the linears inside every shell whose storage is one of bitsandbytes' forms, in place, value by value.

    Raises ImportError if bitsandbytes is missing.
    """
    require_bitsandbytes()
    operation = AutoHfQuantizer.from_config(inner, pre_quantized=False).get_quantize_ops()
    for shell in list(model.modules()):
        if not isinstance(shell, CompressedLinear) or not is_bnb_form(shell.storage):
            continue
        plain = {child: module for child, module in shell.named_children() if type(module) is nn.Linear}
        for child, module in plain.items():
            shell.set_submodule(child, quantized_alike(module, inner, operation))


def quantized_alike(linear: nn.Linear, inner: BitsAndBytesConfig, operation: Any) -> Any:
    """bitsandbytes' linear of the same function, but for the rounding of each value."""
    holder: Any = _Holder(linear)
    replace_with_bnb_linear(holder, quantization_config=inner, pre_quantized=False)
    new = holder.linear
    found = operation.convert({"linear.weight": [linear.weight.data]}, model=holder, full_layer_name="linear.weight")
    new.weight = found["linear.weight"]
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    keep_as_saved(new)
    return new.train(linear.training)


class _Holder(nn.Module):
    """A model of one linear, as far as transformers' operations ask."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        return self.get_parameter(name)
