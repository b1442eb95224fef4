"""Single values that a user or a config.json gives: each is checked, and said what is wrong with it."""

from __future__ import annotations

import re
from typing import Any

from accelerate.utils import convert_file_size_to_int

from .structures.format import format_named


def size_in_bytes(size: Any, option: str) -> int:
    """Return bytes; `option` is what the user calls them. ValueError or TypeError for what is no size."""
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"{option} must be bytes or a size such as '2.8GB', got {size!r}")
    if re.search(r"[kmgKMG]b\s*$", str(size)):
        raise ValueError(f"{option} {size!r} ends in a small b, which means bits: write '2.8GB', '500MB', '1GiB'")
    try:
        found = int(size) if str(size).isdecimal() else int(convert_file_size_to_int(size))
    except ValueError as error:
        raise ValueError(f"{option} {size!r} is no size: write bytes, or '2.8GB', '500MB', '1GiB'") from error
    if found <= 0:
        raise ValueError(f"{option} must be above 0 bytes, got {size!r}")
    return found


def checked_ratio(ratio: Any) -> float:
    """Return the fraction kept as a float. TypeError for what is no number, ValueError outside of 0 to 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"ratio must be a number, got {type(ratio).__name__}")
    if not 0 < ratio <= 1:
        hint = ""
        if 1 < ratio < 100:
            hint = f"; {ratio:g} % kept is ratio={ratio / 100:g}, {ratio:g} % removed is ratio={1 - ratio / 100:g}"
        elif ratio == 0:
            hint = "; nothing removed is ratio=1"
        elif -1 < ratio < 0:
            hint = f"; {-ratio:g} removed is ratio={1 + ratio:g}"
        raise ValueError(f"ratio is the fraction of bytes KEPT, 0 < ratio <= 1, got {ratio}{hint}")
    return float(ratio)


def check_integer(name: str, value: Any, at_least: int) -> None:
    """TypeError if it is no integer, ValueError if it is too small."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_modules(modules: dict[str, dict[str, Any]]) -> None:
    """ValueError for modules of config.json that no loader could read; names the first."""
    if not isinstance(modules, dict):
        raise ValueError(f"quantization_config.modules must map names to ranks, got {type(modules).__name__}")
    for name, entry in modules.items():
        if not isinstance(entry, dict) or set(entry) - {"rank"} != {"structure", "encoding"}:
            raise ValueError(
                f"quantization_config.modules: {name}: expected a structure, an encoding and perhaps a rank, got "
                f"{entry!r}"
            )
        try:
            format = format_named(entry["structure"], entry["encoding"])
        except ValueError as error:
            raise ValueError(
                f"{name}: {error}; this version cannot read it: upgrade (pip install -U optimum-dobisvd), or mend "
                "config.json"
            ) from error
        if format.structure.has_rank:
            check_integer(f"{name}: rank", entry.get("rank"), at_least=1)
        elif entry.get("rank") is not None:
            raise ValueError(
                f"{name}: structure {entry['structure']!r} has no rank, config.json says {entry['rank']!r}; mend it"
            )
