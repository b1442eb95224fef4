"""bitsandbytes' encodings: `nf4`, `fp4`, `nf4_dq`, `fp4_dq` (scales quantized once more) and `llm_int8`."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from ..factorization.factors import Gauge
from .base import Encoding, LinearShape
from .bitsandbytes_learning import LearnableBlocks
from .bitsandbytes_rounding import (
    dequantized_weight,
    hf_quantizer_of,
    keep_as_saved,
    put_empty_linears,
    quantized_linear,
    require_bitsandbytes,
    round_with_feedback,
)
from .error_feedback import NearestOfCode
from .input_gram import Feedback, InputGram, OutputErrors
from .int8 import fake_quantize_rows
from .rounding import Rounding
from .settings import check_options, refuse_layer_names, with_method

_FOUR_BIT_NAME = re.compile(r"(nf4|fp4)(_dq)?")
_LLM_INT8 = "llm_int8"
_BNB_BLOCK = 64
_BNB_NESTED_BLOCK = 256
_FEEDBACK_DAMPING = 0.01
# Scales that losses are told by. Rounding tries more of them, and gains less by it than on values that feedback has
# not moved: with these three, what is told is 0.97 to 1.04 of what is lost in the end.
_EXPECTED_FRACTIONS = (0.8, 0.9, 1.0)
# QLoRA, appendix E: quantiles of a normal distribution, zero among them. And the values of a 4-bit float.
CODES = {
    "nf4": (
        *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
    ),
    "fp4": tuple(sign * value / 12 for sign in (-1, 1) for value in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)),
}


class BitsAndBytes(Encoding):
    """What a `BitsAndBytesConfig` asks for."""

    quant_method = "bitsandbytes"
    gauge = Gauge.ROTATED
    loss_is_measured = True
    has_more_tensors = True
    bits: int

    @classmethod
    def named(cls, name: str, settings: Any = None) -> BitsAndBytes | None:
        if name == _LLM_INT8:
            return LLMInt8(settings)
        found = _FOUR_BIT_NAME.fullmatch(name)
        return None if found is None else FourBit(found[1], found[2] is not None, settings)

    @classmethod
    def from_setting(cls, setting: Any, *, strict: bool) -> BitsAndBytes | None:
        """Take a `BitsAndBytesConfig`, one as a dictionary, or a name."""
        if isinstance(setting, str):
            setting = _bnb_settings_named(setting)
        if isinstance(setting, dict) and _is_bnb(setting):
            known = {key: value for key, value in setting.items() if key != "quant_method"}
            if strict:
                check_options(BitsAndBytesConfig, BitsAndBytesConfig(), setting)
            setting = BitsAndBytesConfig.from_dict({k: value for k, value in known.items() if not k.startswith("_")})
        if not isinstance(setting, BitsAndBytesConfig):
            return None
        _check_bnb(setting)
        if setting.load_in_8bit:
            return LLMInt8(setting)
        return FourBit(setting.bnb_4bit_quant_type, bool(setting.bnb_4bit_use_double_quant), setting)

    def remembered(self) -> Any:
        values = copy.deepcopy(self.settings.to_dict())
        return {key: value for key, value in values.items() if value is not None}

    def as_applied(self) -> Any:
        return BitsAndBytesConfig.from_dict(
            {key: value for key, value in self.remembered().items() if key != "quant_method" and key[0] != "_"}
        )

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Round every value on its own."""
        new = quantized_linear(linear, self.settings, dtype)
        return new, dequantized_weight(new)

    def require(self) -> None:
        require_bitsandbytes()

    def hf_quantizer(self) -> Any:
        return hf_quantizer_of(self.settings, pre_quantized=True)

    def empty(self, linear: nn.Linear, full_rank: int) -> nn.Module:
        holder = nn.Module()
        holder.linear = linear
        put_empty_linears(holder, self.settings, pre_quantized=True)
        return holder.linear

    def loaded(self, name: str, module: nn.Module) -> nn.Module:
        keep_as_saved(module)
        return module

    def loaded_model(self, model: Any) -> None:
        """Set what peft and transformers' Trainer ask of a model whose linears are bitsandbytes'."""
        setattr(model, f"is_loaded_in_{self.bits}bit", True)
        # Private, and needed to save the model again: transformers would undo the conversions of loading, and those
        # of bitsandbytes have no inverse (their linears write their tensors by themselves).
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            each
            for each in conversions
            if not any(hasattr(operation, "hf_quantizer") for operation in getattr(each, "operations", ()))
        ]

    def forget(self, model: Any) -> None:
        model.__dict__.pop(f"is_loaded_in_{self.bits}bit", None)

    def before_saving(self, name: str, module: nn.Module, dtype: torch.dtype) -> None:
        """Bring a bias into the model's dtype again: every pass casts it to what it computes in."""
        bias: Any = module.bias
        if bias is not None:
            bias.data = bias.data.to(dtype)


class FourBit(BitsAndBytes):
    """Two values a byte, a scale for 64 of them."""

    bits = 4
    roundings: ClassVar[tuple[str, ...]] = ("feedback", "nearest", "learned")
    rounding = Rounding("feedback", without_text=True)
    quantizes_in_threads = True
    # Blocks that run on into the next row are legal, and bitsandbytes 0.50 unpacks them wrongly on CPUs: errors of
    # half a matrix wherever inputs are a multiple of 16 and not of 64.
    in_multiple = _BNB_BLOCK

    def __init__(self, kind: str, nested: bool, settings: BitsAndBytesConfig | None = None) -> None:
        self.kind, self.nested, self.settings = kind, nested, settings
        self.name = f"{kind}_dq" if nested else kind
        self.relative_error = 0.008 if kind == "nf4" else 0.02
        self.dense_encodings = (self.name, "int8")

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        blocks = -(-shape.numel // _BNB_BLOCK)
        state: dict[str, object] = {
            "quant_type": self.kind,
            "blocksize": _BNB_BLOCK,
            "dtype": "bfloat16" if element_size == 2 else "float32",
            "shape": [shape.out_features, shape.in_features],
        }
        scales = 4 * blocks
        if self.nested:
            state |= {"nested_blocksize": _BNB_NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
            # Its own scales and map; and the offset is written with up to 24 characters.
            scales = blocks + 4 * -(-blocks // _BNB_NESTED_BLOCK) + 4 * 256 + 24 - len("0.0")
        return -(-shape.numel // 2) + scales + 4 * 16 + len(json.dumps(state))

    def rounding_errors(
        self, weight: Tensor, full_rank: int, gram: InputGram, rows: Tensor | None = None
    ) -> OutputErrors:
        if self.rounding.algorithm == "nearest":
            rounded = fake_quantize_to_code(weight, CODES[self.kind], gram.matrix.diagonal(), fractions=(1.0,))
            return gram.errors(rounded - weight, rows)
        feedback = Feedback(_FEEDBACK_DAMPING)
        rounded = fake_quantize_to_code(weight, CODES[self.kind], gram.conditional_variances(feedback))
        return gram.errors_with_feedback(rounded - weight, feedback, rows)

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Round with error feedback where there is a Gram, every value on its own where there is none."""
        if gram is None or not self.uses_text:
            return super().quantize(linear, full_rank, dtype)
        return round_with_feedback(linear, self.settings, gram, dtype)

    @property
    def loss_name(self) -> str:
        return f"{self.name}-nearest" if self.rounding.algorithm == "nearest" else self.name

    def learnable(self, linear: nn.Linear, dtype: torch.dtype) -> LearnableBlocks:
        return LearnableBlocks(linear, self.settings, dtype)

    def from_learned(self, linear: LearnableBlocks) -> nn.Module:
        return linear.quantized()

    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        packed, blocks = -(-shape.numel // 2), -(-shape.numel // _BNB_BLOCK)
        return {"weight": ([packed, 1], "U8"), "weight.absmax": ([blocks], "U8" if self.nested else "F32")}


class LLMInt8(BitsAndBytes):
    """LLM.int8(): a scale per row; activations are rounded, too, but for outliers."""

    name = _LLM_INT8
    bits = 8
    relative_error = 1e-4
    dense_encodings = (_LLM_INT8, "int8")

    def __init__(self, settings: BitsAndBytesConfig | None = None) -> None:
        self.settings = settings

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        return shape.numel + 4 * shape.out_features + 1

    def rounding_errors(
        self, weight: Tensor, full_rank: int, gram: InputGram, rows: Tensor | None = None
    ) -> OutputErrors:
        return gram.errors(fake_quantize_rows(weight) - weight, rows)

    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        return {"weight": ([shape.out_features, shape.in_features], "I8"), "SCB": ([shape.out_features], "F32")}


def fake_quantize_to_code(
    weight: Tensor, code: tuple[float, ...], felt: Tensor, fractions: Sequence[float] = _EXPECTED_FRACTIONS
) -> Tensor:
    """Return the nearest value of a code to every weight (`m x n`), in units of a scale of 64 neighbors.

    The scale is the one of these fractions of their largest magnitude that loses least, by how much each input is
    `felt` (`n`); see `ErrorFeedback.fitted_scales`.
    """

    def blocks(values: Tensor) -> Tensor:
        return nn.functional.pad(values.reshape(-1), (0, -values.numel() % _BNB_BLOCK)).view(-1, _BNB_BLOCK)

    costs = blocks((felt / felt.mean().clamp_min(1e-300)).float().expand(weight.shape))
    flat = blocks(weight)
    largest = flat.abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    # In float32, which decides between values just as well and is several times as fast.
    units = (flat / largest).float()
    nearest = NearestOfCode(torch.tensor(sorted(code), device=weight.device))
    best = nearest.best_fractions(units, costs, fractions)[:, None]
    rounded = (nearest(units / best) * best).to(weight) * largest
    return rounded.reshape(-1)[: weight.numel()].view(weight.shape)


def _bnb_settings_named(name: str) -> BitsAndBytesConfig | None:
    if name == _LLM_INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    found = _FOUR_BIT_NAME.fullmatch(name)
    if found is None:
        return None
    # Its own default computes in float32, several times as slow on GPUs and on CPUs with bf16 instructions.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=found[1],
        bnb_4bit_use_double_quant=found[2] is not None,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _is_bnb(values: dict[str, Any]) -> bool:
    method = with_method(values)
    return method == "bitsandbytes" or (method is None and ("load_in_4bit" in values or "load_in_8bit" in values))


def _check_bnb(settings: BitsAndBytesConfig) -> None:
    if not settings.is_quantizable():
        raise ValueError("BitsAndBytesConfig() quantizes nothing: pass load_in_4bit=True or load_in_8bit=True")
    refuse_layer_names("llm_int8_skip_modules", settings.llm_int8_skip_modules)
    if settings.load_in_4bit and str(settings.bnb_4bit_quant_storage) != "torch.uint8":
        raise ValueError(
            f"bnb_4bit_quant_storage={settings.bnb_4bit_quant_storage} cannot be stored here: leave it at uint8"
        )
    if settings.llm_int8_has_fp16_weight:
        raise ValueError("llm_int8_has_fp16_weight keeps 16-bit weights, which saves nothing: leave it out")
