"""Checks of transformers' own quantization configurations that several encodings have in common."""

from __future__ import annotations

import difflib
import inspect
from typing import Any


def with_method(values: dict[str, Any]) -> str | None:
    """Return the method that a configuration given as a dictionary is of, None if it does not say."""
    method = values.get("quant_method")
    return getattr(method, "value", method)


def check_options(makes: Any, example: Any, values: dict[str, Any]) -> None:
    """Raise ValueError for a key that a configuration does not know: it would be dropped without a word."""
    known = {*inspect.signature(makes).parameters, *example.to_dict()} - {"kwargs"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "its documentation lists those there are"
            raise ValueError(f"quantization: {makes.__name__} has no option {key!r}; {hint}")


def refuse_layer_names(option: str, value: Any) -> None:
    """Raise ValueError for an option that names layers of the dense model, if it is set."""
    if value:
        raise ValueError(
            f"{option} names layers of the dense model: name what is to stay as it is in "
            "DobiSVDConfig.modules_to_not_convert, or per module in overrides"
        )
