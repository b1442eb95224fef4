"""Which dense model a compressed checkpoint is compared with: the one that was named, or the one in its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..encodings.base import QUANT_METHOD
from .saved_recipe import RECIPE_NAME, compress_options
from .sources import ModelSource, model_source


@dataclass(frozen=True)
class DenseSource:
    """The dense model, and the dtype that the checkpoint was compressed in, if that is known.

    Where there is none to compare with, `source` is None and `note` says why.
    """

    source: ModelSource | None
    dtype: str | None = None
    note: str | None = None


def dense_source(out: str, named: str | None) -> DenseSource:
    """Return the dense model of the checkpoint `out`; `named` is what the user called it, None where nothing.

    Raises:
        ValueError, OSError: the one that was named is `out` itself, is compressed, or cannot be found.
    """
    if named is not None:
        source = model_source(named)
        reason = _reason_against(source, out)
        if reason is not None:
            raise ValueError(f"--dense {named} {reason}; name the model that {out} was made from")
        return DenseSource(source)
    made_with = compress_options(Path(out))
    if made_with is None or "model" not in made_with:
        return DenseSource(None, note=f"{out} has no {RECIPE_NAME} that names the dense model")
    typed = made_with["model"]
    try:
        source = model_source(typed, made_with.get("gguf_file"))
    except (OSError, ValueError) as error:
        return DenseSource(None, note=f"the dense model {typed} cannot be found: {error}")
    reason = _reason_against(source, out)
    if reason is not None:
        return DenseSource(None, note=f"the dense model {typed}, which the recipe of {out} names, {reason}")
    return DenseSource(source, made_with.get("dtype"))


def _reason_against(source: ModelSource, out: str) -> str | None:
    """Why a model is not the dense one to compare with; None where nothing speaks against it."""
    if source.location == out or Path(source.location).expanduser().resolve() == Path(out).expanduser().resolve():
        return "is that checkpoint itself" if source.gguf_file is None else None
    if source.gguf_file is None and quant_method(source) == QUANT_METHOD:
        return "is a compressed model"
    return None


def quant_method(source: ModelSource) -> Any:
    """What config.json says; None where it cannot be read, which loading the model will tell of."""
    from transformers import PretrainedConfig

    try:
        values, _ = PretrainedConfig.get_config_dict(source.location)
    except (OSError, ValueError):
        return None
    return (values.get("quantization_config") or {}).get("quant_method")
