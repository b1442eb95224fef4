"""Modules as layers by types, for tables and pictures."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

_NUMBER = re.compile(r"\d+")


class Named(Protocol):
    """Anything that says which module it is about."""

    @property
    def name(self) -> str: ...


M = TypeVar("M", bound=Named)


@dataclass(frozen=True)
class Grid(Generic[M]):
    """Modules by type and layer.

    Attributes:
        types: short names of the types in the order they come in a layer, e.g. `q_proj`; where two types end alike
            (GPT-2's `attn.c_proj` and `mlp.c_proj`) as many components as tell them apart.
        layers: layer numbers, ascending.
        cells: `(type, layer) -> modules`; several where a layer has experts.
    """

    types: list[str]
    layers: list[int]
    cells: dict[tuple[str, int], list[M]]

    def of_type(self, kind: str) -> list[M]:
        """All modules of a type, layer after layer."""
        return [module for layer in self.layers for module in self.cells.get((kind, layer), [])]


def grid_of(modules: Iterable[M]) -> Grid[M]:
    """Sort modules into a grid. A name without a number counts as layer 0."""
    placed: dict[tuple[str, int], list[M]] = defaultdict(list)
    for module in modules:
        path, layer = _path_and_layer(module.name)
        placed[path, layer].append(module)
    paths = list(dict.fromkeys(path for path, _ in placed))
    short = _short_names(paths)
    cells = {(short[path], layer): found for (path, layer), found in placed.items()}
    return Grid(list(dict.fromkeys(short.values())), sorted({layer for _, layer in cells}), cells)


def _path_and_layer(name: str) -> tuple[str, int]:
    """`model.layers.3.mlp.experts.7.up_proj` -> (`mlp.experts.*.up_proj`, 3)."""
    parts = name.split(".")
    place = next((index for index, part in enumerate(parts) if _NUMBER.fullmatch(part)), None)
    if place is None:
        return name, 0
    below = ["*" if _NUMBER.fullmatch(part) else part for part in parts[place + 1 :]]
    return ".".join(below) or name, int(parts[place])


def _short_names(paths: list[str]) -> dict[str, str]:
    """Each path by its shortest ending that no other path has."""
    endings = Counter(ending for path in paths for ending in _endings(path))
    return {path: next((e for e in _endings(path) if endings[e] == 1), path) for path in paths}


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    starts = [start for start in range(len(parts) - 1, -1, -1) if parts[start] != "*"]
    return [".".join(parts[start:]) for start in starts]
