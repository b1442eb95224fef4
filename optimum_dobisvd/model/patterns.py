"""Names and patterns of modules: which modules a person means, and what was asked for them."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

REGEX_PREFIX = "re:"


@dataclass(frozen=True)
class Override:
    """What a person asked for one matrix: a fraction of its dense bytes to keep, a rank, or that it is left alone.

    ValueError where none or several are given, or a value is out of its range.
    """

    ratio: float | None = None
    rank: int | None = None
    dense: bool | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of ratio, rank and dense is needed, got {' and '.join(given) or 'none'}; keep one"
            )
        if self.ratio is not None and not is_keep_ratio(self.ratio):
            raise ValueError(f"ratio is {self.ratio!r}; it is the fraction of the bytes kept, above 0 and at most 1")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"rank is {self.rank!r}; it must be a whole number of at least 1")
        if self.dense is not None and self.dense is not True:
            raise ValueError(
                f"dense is {self.dense!r}; it can only be true, remove the override to allocate the matrix"
            )


def is_keep_ratio(value: object) -> TypeGuard[float]:
    """Whether the value is a number in (0, 1]; a boolean is not a number here."""
    return type(value) in (int, float) and math.isfinite(value) and 0 < value <= 1  # type: ignore[arg-type,operator]


def near_names(wanted: str, names: Iterable[str]) -> str:
    """The end of an error message: the names most like the wanted one, or else the first few there are."""
    known = list(dict.fromkeys(names))
    close = difflib.get_close_matches(wanted, known, n=3)
    if close:
        return f"near names: {', '.join(map(repr, close))}"
    if known:
        return f"names there are: {', '.join(map(repr, known[:3]))}{', ...' if len(known) > 3 else ''}"
    return "there are no names to match"


def matching_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The names a pattern means, in their order; empty where it means none.

    `"re:REGEX"` matches names that the regular expression covers from end to end. Any other pattern matches a run of
    whole dotted components anywhere in the name, the whole name included: `"o_proj"` matches
    `model.layers.0.self_attn.o_proj`, `"layers.1"` matches everything under `model.layers.1` and nothing under
    `model.layers.10`.

    Raises:
        ValueError: the regular expression is not valid.
    """
    if not pattern.startswith(REGEX_PREFIX):
        return [name for name in names if f".{pattern}." in f".{name}."]
    try:
        regex = re.compile(pattern.removeprefix(REGEX_PREFIX))
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a valid regular expression: {error}; correct it") from error
    return [name for name in names if regex.fullmatch(name)]


def select(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that at least one of the patterns means (see `matching_names`).

    Raises:
        ValueError: a regular expression is not valid, a pattern matches no name, or `patterns` is a bare string.
    """
    if isinstance(patterns, str):
        raise ValueError(f"patterns must be a list of strings, got the string {patterns!r}; write [{patterns!r}]")
    known = list(names)
    return {name for pattern in patterns for name in _some_names(pattern, known)}


def resolve_overrides(overrides: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, Override]:
    """Turns `{pattern: {"ratio": r} | {"rank": k} | {"dense": True}}` into `{name: Override}`, in the names' order.

    Where several patterns match a name, the later one wins; a pattern that is the full name wins over all others.

    Raises:
        ValueError: naming the pattern, for one that matches no name, a bad regular expression, an unknown key, a bad
            value, or not exactly one of ratio, rank and dense.
    """
    known = list(names)
    parsed = {pattern: _parse_override(pattern, entry) for pattern, entry in overrides.items()}
    chosen: dict[str, Override] = {}
    for pattern, override in parsed.items():
        chosen |= dict.fromkeys(_some_names(pattern, known), override)
    return {name: parsed.get(name, chosen[name]) for name in known if name in chosen}


def _some_names(pattern: str, names: list[str]) -> list[str]:
    matched = matching_names(pattern, names)
    if matched:
        return matched
    meant = names
    if not pattern.startswith(REGEX_PREFIX):  # a plain pattern may be meant for every run of as many components
        length, split = pattern.count(".") + 1, [name.split(".") for name in names]
        meant = [".".join(parts[i : i + length]) for parts in split for i in range(len(parts) - length + 1)]
    hint = near_names(pattern.removeprefix(REGEX_PREFIX), meant)
    raise ValueError(f"pattern {pattern!r} matches no module; {hint}; correct or remove it")


def _parse_override(pattern: str, entry: Mapping[str, Any]) -> Override:
    if not isinstance(entry, Mapping):
        raise ValueError(f'override {pattern!r}: expected an object such as {{"rank": 64}}, got {entry!r}')
    known = [field.name for field in fields(Override)]
    for key in entry:
        if key not in known:
            raise ValueError(f"override {pattern!r}: unknown key {key!r}; {near_names(str(key), known)}")
    try:
        return Override(**entry)
    except ValueError as error:
        raise ValueError(f"override {pattern!r}: {error}") from error


def pool_name(block: str, name: str) -> str:
    """Return what names of a block have in common that differ by a number alone (experts): `*` for every number."""
    return block + re.sub(r"(?<=[._])\d+(?=\.|$)", "*", name.removeprefix(block))
