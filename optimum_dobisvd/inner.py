"""The quantization stacked on low rank: which ones there are, what their options mean for bytes, what is remembered.

Nothing here needs the libraries that do it; see `integrations.inner_gptq` and `integrations.inner_bnb`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import logging
import re
from typing import Any, cast

from transformers import BitsAndBytesConfig, GPTQConfig

from .storage.inner_forms import GPTQ_BITS, gptq_form

logger = logging.getLogger(__name__)

InnerConfig = GPTQConfig | BitsAndBytesConfig

_RUN_ONLY = ("dataset", "tokenizer")
_IN_MEMORY_FORMAT = "gptq_v2"
"""GPTQModel's: zero points as they are. The format of auto-gptq (`gptq`), which has them less one, is read, too."""


def inner_config(given: Any, *, wished: bool = False) -> InnerConfig | None:
    """What a user or config.json gave as `inner`, as one of transformers' own configurations.

    Args:
        given: such a configuration, or one as a dictionary.
        wished: for a quantization that is still to be made. A checkpoint may come from a transformers with more
            options.

    Raises:
        ValueError: another method, a misspelt option, or options that cannot work; names the remedy.
    """
    if given is None:
        return None
    if isinstance(given, dict):
        given = _from_dict(given, wished)
    if isinstance(given, GPTQConfig) and type(given).__name__ == "GPTQConfig":
        _check_gptq(given)
        if wished:
            _tell_unused(given)
        return given
    if isinstance(given, BitsAndBytesConfig):
        _check_bnb(given)
        return given
    method = getattr(given, "quant_method", None)
    if method == "dobi_svd":
        raise ValueError(
            "inner is a DobiSVDConfig, and low rank is what the outer one does: give inner=GPTQConfig(...) or "
            "inner=BitsAndBytesConfig(...), or drop it"
        )
    what = getattr(method, "value", method) or type(given).__name__
    raise ValueError(
        f"inner is {what!r}, which cannot be stacked on low rank: give a GPTQConfig or a BitsAndBytesConfig"
    )


def inner_storage(inner: InnerConfig) -> str:
    """The storage that linears get, as plans and config.json name it."""
    if isinstance(inner, GPTQConfig):
        return gptq_form(inner.bits, inner.group_size).name
    if inner.load_in_8bit:
        return "llm_int8"
    return f"{inner.bnb_4bit_quant_type}_dq" if inner.bnb_4bit_use_double_quant else inner.bnb_4bit_quant_type


def inner_from_name(name: str) -> InnerConfig:
    """What a command line calls it: `gptq4`, `gptq3_g64`, `nf4`, `nf4_dq`, `fp4`, `llm_int8`, or a config as JSON.

    ValueError for an unknown name or bad JSON.
    """
    if name.lstrip().startswith("{"):
        try:
            values = json.loads(name)
        except json.JSONDecodeError as error:
            raise ValueError(f"inner is no JSON ({error}): {name}") from error
        return cast(InnerConfig, inner_config(values, wished=True))
    gptq = re.fullmatch(r"gptq([2348])(?:_g(\d+))?", name)
    if gptq is not None:
        return cast(InnerConfig, inner_config(GPTQConfig(bits=int(gptq[1]), group_size=int(gptq[2] or 128))))
    four_bit = re.fullmatch(r"(nf4|fp4)(_dq)?", name)
    if four_bit is not None:
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=four_bit[1], bnb_4bit_use_double_quant=four_bit[2] is not None
        )
    if name == "llm_int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise ValueError(
        f"unknown inner quantization {name!r}: gptq2, gptq3, gptq4 or gptq8 (gptq4_g32 for groups of 32), nf4, fp4 "
        "(nf4_dq for double quantization), llm_int8, or a GPTQConfig or BitsAndBytesConfig as JSON"
    )


def other_storages(inner: InnerConfig | None) -> list[str]:
    """What else a mixture may choose: with GPTQ, the other bits at the same group size."""
    if not isinstance(inner, GPTQConfig):
        return []
    return [gptq_form(bits, inner.group_size).name for bits in GPTQ_BITS if bits != inner.bits]


def remembered(inner: InnerConfig) -> dict[str, Any]:
    """As JSON values, without the inputs of one run."""
    values = copy.deepcopy(inner.to_dict())
    return {key: value for key, value in values.items() if key not in _RUN_ONLY and value is not None}


def as_applied(inner: InnerConfig) -> InnerConfig:
    """A copy without calibration text, in the format of the tensors in memory: what a quantized model remembers."""
    values = remembered(inner)
    if isinstance(inner, GPTQConfig):
        values |= {"format": _IN_MEMORY_FORMAT, "checkpoint_format": _IN_MEMORY_FORMAT}
    return _from_dict(values)


def _check_options(makes: Any, example: InnerConfig, values: dict[str, Any]) -> None:
    """ValueError for a key that the configuration does not know: it would be dropped without a word."""
    known = {*inspect.signature(makes).parameters, *example.to_dict()} - {"kwargs"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "its documentation lists those there are"
            raise ValueError(f"inner: {makes.__name__} has no option {key!r}; {hint}")


_UNUSED = ("model_seqlen", "max_input_length", "batch_size", "pad_token_id", "cache_block_outputs")


def _tell_unused(inner: GPTQConfig) -> None:
    usual = GPTQConfig(bits=4)
    given = [name for name in _UNUSED if getattr(inner, name) != getattr(usual, name)]
    if given:
        logger.warning(
            "GPTQConfig's %s is not used: nsamples, seqlen and batch_size of the DobiSVDConfig say what its rounding "
            "is calibrated on",
            ", ".join(given),
        )


def _from_dict(values: dict[str, Any], wished: bool = False) -> Any:
    method = values.get("quant_method")
    method = getattr(method, "value", method)
    known = {key: value for key, value in values.items() if key != "quant_method"}
    if method == "gptq":
        if wished:
            _check_options(GPTQConfig, GPTQConfig(bits=4), values)
        return GPTQConfig.from_dict(known)
    if method == "bitsandbytes" or (method is None and ("load_in_4bit" in values or "load_in_8bit" in values)):
        if wished:
            _check_options(BitsAndBytesConfig, BitsAndBytesConfig(), values)
        return BitsAndBytesConfig.from_dict({key: value for key, value in known.items() if not key.startswith("_")})
    if method == "dobi_svd":
        raise ValueError("inner is a dobi_svd configuration, and low rank is what the outer one does: drop it")
    raise ValueError(
        f"inner has quant_method {method!r}, which cannot be stacked on low rank: 'gptq' and 'bitsandbytes' can"
    )


def _check_gptq(inner: GPTQConfig) -> None:
    if inner.group_size == -1 and inner.act_group_aware:
        raise ValueError(
            "GPTQConfig(group_size=-1) has no groups to order by activation, and gptqmodel refuses it: pass "
            "act_group_aware=False, too, or a group_size such as 32 or 64"
        )
    if inner.group_size != -1 and inner.group_size not in (16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(
            f"GPTQConfig(group_size={inner.group_size}) is none of gptqmodel's: take -1, 16, 32, 64, 128, 256, 512 "
            "or 1024"
        )
    if inner.format not in ("gptq", "gptq_v2"):
        raise ValueError(f"GPTQConfig(format={inner.format!r}) cannot be stacked on low rank: take 'gptq'")
    if inner.block_name_to_quantize or inner.module_name_preceding_first_block:
        raise ValueError(
            "block_name_to_quantize and module_name_preceding_first_block say where a model has its blocks, which is "
            "found out here: leave them out"
        )
    if inner.modules_in_block_to_quantize:
        raise ValueError(
            "modules_in_block_to_quantize names layers of the dense model: name what is to stay as it is in "
            "DobiSVDConfig.modules_to_not_convert, or per module in overrides"
        )


def _check_bnb(inner: BitsAndBytesConfig) -> None:
    if not inner.is_quantizable():
        raise ValueError("inner=BitsAndBytesConfig() quantizes nothing: pass load_in_4bit=True or load_in_8bit=True")
    if inner.llm_int8_skip_modules:
        raise ValueError(
            "llm_int8_skip_modules names layers of the dense model: name what is to stay as it is in "
            "DobiSVDConfig.modules_to_not_convert, or per module in overrides"
        )
    if inner.load_in_4bit and str(inner.bnb_4bit_quant_storage) != "torch.uint8":
        raise ValueError(
            f"bnb_4bit_quant_storage={inner.bnb_4bit_quant_storage} cannot be stacked on low rank: leave it at uint8"
        )
    if inner.llm_int8_has_fp16_weight:
        raise ValueError("llm_int8_has_fp16_weight keeps 16-bit weights, which saves nothing: leave it out")
