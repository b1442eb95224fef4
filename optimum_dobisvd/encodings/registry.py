"""The encodings there are. To add one is a file beside this one, and a line here."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from ..registry import Registry
from .autoround import AutoRound
from .base import QUANT_METHOD, Encoding
from .bitsandbytes import BitsAndBytes
from .float import Float
from .gptq import GPTQ
from .int8 import Int8
from .remap import Remap
from .settings import with_method

ENCODINGS: Registry[Any] = Registry("kind of encoding")
"""Classes derived from `Encoding`."""
ENCODINGS.register("float", Float)
ENCODINGS.register("int8", Int8)
ENCODINGS.register("remap", Remap)
ENCODINGS.register("autoround", AutoRound)  # before the one it is a kind of
ENCODINGS.register("gptq", GPTQ)
ENCODINGS.register("bitsandbytes", BitsAndBytes)

_NAMES = "float, int8, remap, gptq4_g32 (2, 3, 4, 8 bits, groups of any size), nf4, fp4, nf4_dq, fp4_dq, llm_int8"


def encoding_named(name: Any, settings: Any = None) -> Encoding:
    """Return the encoding of that name, as plans and config.json have it.

    Args:
        name: such as `int8`, `gptq4_g32`, `nf4`.
        settings: transformers' configuration that it is made with.

    Raises:
        ValueError: there is none; lists the names there are.
    """
    # A name may come straight from a hand-edited JSON file, so it need not be a string (nor hashable).
    if isinstance(name, str):
        found = _named(name) if settings is None else _make(name, settings)
        if found is not None:
            return found
    raise ValueError(f"unknown encoding {name!r}; known: {_NAMES}")


@functools.cache
def _named(name: str) -> Encoding | None:
    return _make(name, None)


def _make(name: str, settings: Any) -> Encoding | None:
    kinds = (ENCODINGS.get(kind) for kind in ENCODINGS)
    return next((found for kind in kinds if (found := kind.named(name, settings)) is not None), None)


def beside(encoding: Encoding, name: str) -> Encoding:
    """Return the encoding of that name that stands beside another in one model.

    It is made with the settings of the other, and rounded as that one is if it can be. ValueError as `encoding_named`.
    """
    found = encoding_named(name, encoding.settings)
    return found.rounded_by(encoding.rounding) if encoding.rounding.algorithm in found.roundings else found


def rounded(encoding: Encoding, rounding: str | None, settings: Mapping[str, Any]) -> Encoding:
    """Return the encoding with the rounding that a user asks for, `rounding` and `rounding_settings`.

    Raises:
        ValueError: there is no such rounding or setting, or it does not go with the encoding.
    """
    if rounding is None and not settings:
        return encoding
    return encoding.rounded_by(encoding.rounding.changed(rounding, settings))


def encoding_of(setting: Any, *, strict: bool = True) -> Encoding:
    """Return what a user's `quantization` means: a name, transformers' configuration, or one as a dictionary or JSON.

    Args:
        setting: None is `float`.
        strict: whether an option that a configuration does not know is an error.

    Raises:
        ValueError: it means none, or has options that cannot be stored; names the remedy.
    """
    if setting is None:
        return Float()
    if isinstance(setting, str) and setting.lstrip().startswith("{"):
        setting = _from_json(setting)
    for kind in ENCODINGS:
        found = ENCODINGS.get(kind).from_setting(setting, strict=strict)
        if found is not None:
            return found
    if isinstance(setting, str):
        raise ValueError(
            f"unknown quantization {setting!r}: int8, remap, gptq2, gptq3, gptq4 or gptq8 (gptq4_g32 for groups of "
            "32), autoround4 (the same with learned codes), nf4, fp4 (nf4_dq for double quantization), llm_int8, or a "
            "GPTQConfig, AutoRoundConfig or BitsAndBytesConfig as JSON"
        )
    method = with_method(setting) if isinstance(setting, dict) else getattr(setting, "quant_method", None)
    what = getattr(method, "value", method) or type(setting).__name__
    if what == QUANT_METHOD:
        raise ValueError(
            "quantization is a DobiSVDConfig, and low rank is what the outer one does: give a name such as 'int8', "
            "GPTQConfig(...) or BitsAndBytesConfig(...), or drop it"
        )
    raise ValueError(
        f"quantization is {what!r}, which factors cannot be stored in: give a name such as 'int8', a GPTQConfig or a "
        "BitsAndBytesConfig"
    )


def _from_json(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"quantization is no JSON ({error}): {text}") from error
    return dict(values)
