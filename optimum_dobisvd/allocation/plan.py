"""The plan: what every matrix becomes, as a JSON file that a person can read and edit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic_files import write_text_atomically
from ..model.patterns import is_keep_ratio, near_names
from ..model.target import Target, targets_by_name
from ..structures.format import Format, format_named
from .ranges import read_ranges, write_ranges

FORMAT_VERSION = 2
_NEEDED_KEYS = ("format_version", "method", "allocation", "ratio", "modules")
_PLAN_KEYS = (*_NEEDED_KEYS, "basis")
_MODULE_KEYS = ("structure", "rank", "encoding", "directions")
_OLD_KEYS = {"storage": "structure and encoding"}


@dataclass(frozen=True)
class PlannedModule:
    """What one matrix becomes.

    Attributes:
        structure: how it is written as linears, `dense` or `low_rank`.
        encoding: how these are stored; `dense` in `float` is left as it is.
        rank: how many of its singular directions are kept; None for a structure without rank.
        directions: which ones, counted from 0, ascending; None: the leading ones. In a plan's file they are counted
            from 1, as `"1-40,43,45-50"`.

    Raises:
        ValueError: an unknown structure or encoding, a rank that is not a whole number of at least 1, a rank for a
            structure that has none, or directions that are not `rank` ascending numbers.
    """

    structure: str
    encoding: str
    rank: int | None = None
    directions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.directions is not None:
            object.__setattr__(self, "directions", tuple(self.directions))
            self._check_directions(self.directions)
            if self.directions == tuple(range(len(self.directions))):
                object.__setattr__(self, "directions", None)
        if not self.format.structure.has_rank:
            if self.rank is not None:
                raise ValueError(
                    f"structure {self.structure!r} has no rank, got {self.rank!r}; remove the rank or name a low-rank "
                    "structure"
                )
        elif type(self.rank) is not int or self.rank < 1:
            raise ValueError(
                f"rank is {self.rank!r}; structure {self.structure!r} needs a whole number of at least 1 "
                "(to leave the matrix as it is, write structure 'dense' and encoding 'float')"
            )

    def _check_directions(self, directions: tuple[int, ...]) -> None:
        if list(directions) != sorted(set(directions)) or (directions and directions[0] < 0):
            raise ValueError("directions must be ascending numbers, each given once, the first one being 1")
        if len(directions) != self.rank:
            raise ValueError(
                f"rank is {self.rank} and {len(directions)} directions are named; make them agree, or remove "
                "'directions' to keep the leading ones"
            )

    @property
    def format(self) -> Format:
        """Structure and encoding."""
        return format_named(self.structure, self.encoding)

    @property
    def leaves_as_is(self) -> bool:
        """Whether the matrix is left as it is."""
        return self.format.leaves_as_is

    @property
    def kept(self) -> Sequence[int]:
        """The kept directions, counted from 0. ValueError for a structure without rank, which keeps all."""
        if self.rank is None:
            raise ValueError("a matrix that is not factorized has no rank")
        return range(self.rank) if self.directions is None else self.directions

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, as an entry of `modules` in config.json has them: structure, rank if any, encoding."""
        rank = {} if self.rank is None else {"rank": self.rank}
        return {"structure": self.structure, **rank, "encoding": self.encoding}


@dataclass(frozen=True)
class Plan:
    """What every matrix becomes.

    Attributes:
        modules: `{module name: PlannedModule}`.
        method: the compression method the ranks were made for.
        ratio: fraction of the dense bytes asked for, in (0, 1]; None where no ratio was asked for.
        allocation: the allocator that made it.
        basis: where modules name directions, a digest of what these are directions of: the weights, the text and the
            gradients. On others the same numbers would be other directions.

    Raises:
        ValueError: method or allocation is not a non-empty string, the ratio is out of range, or directions are named
            without a basis.
    """

    modules: dict[str, PlannedModule]
    method: str
    ratio: float | None
    allocation: str
    basis: str | None = None

    def __post_init__(self) -> None:
        named = self.names_directions_of
        if named is not None and not (isinstance(self.basis, str) and self.basis):
            raise ValueError(
                f"module {named!r} names directions, and the plan's basis is {self.basis!r}: there is no telling what "
                "they are directions of; remove 'directions' everywhere, or make the plan again"
            )
        for field in ("method", "allocation"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value:
                raise ValueError(f"the plan's {field} is {value!r}; it must be a name")
        if self.ratio is not None and not is_keep_ratio(self.ratio):
            raise ValueError(f"the plan's ratio is {self.ratio!r}; it must be above 0 and at most 1, or null")

    @property
    def names_directions_of(self) -> str | None:
        """The first module that keeps other directions than its leading ones, None if none does."""
        return next((name for name, module in self.modules.items() if module.directions is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON data; `from_dict` reads it back."""
        modules = {name: _module_to_dict(module) for name, module in self.modules.items()}
        values = (FORMAT_VERSION, self.method, self.allocation, self.ratio, modules)
        data = dict(zip(_NEEDED_KEYS, values, strict=True))
        return data if self.basis is None else {**data, "basis": self.basis}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Reads what `to_dict` made, or a person edited.

        Raises:
            ValueError: an unknown or missing key, another format version, or a bad value; names the module.
        """
        _check_object(data, "the plan")
        # Before the keys: another version may well have other keys, and its own message tells the remedy.
        _check_version(data)
        _check_keys(data, _PLAN_KEYS, _NEEDED_KEYS, "the plan")
        _check_object(data["modules"], "the plan's 'modules'")
        modules = {name: _module_from_dict(name, entry) for name, entry in data["modules"].items()}
        return cls(
            modules,
            method=data["method"],
            ratio=data["ratio"],
            allocation=data["allocation"],
            basis=data.get("basis"),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, one module to a line. The file appears whole or not at all."""
        data = self.to_dict()
        modules = data.pop("modules")
        head = [f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in data.items()]
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in modules.items())
        text = "{\n" + "".join(head) + '  "modules": {\n' + rows + "\n  }\n}\n"
        write_text_atomically(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan that `save` wrote or a person edited.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: naming the file, and the line for invalid JSON or the module for a bad entry.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no plan at {path}; check the path, or make one first") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text file ({error}); a plan is JSON in UTF-8") from error
        try:
            return cls.from_dict(json.loads(text, object_pairs_hook=_object_without_duplicates))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: invalid JSON, {error.msg}; correct that line") from error
        except RecursionError as error:
            raise ValueError(f"{path}: nested far deeper than a plan; make the plan again") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def check(self, targets: Sequence[Target]) -> None:
        """Make sure that the plan is for exactly these matrices and that every entry is possible and worth having.

        Raises:
            ValueError: naming the module, for one that is not among the targets, a target that is not planned, or a
                rank above min(m, n) or whose factors would not be smaller than the dense matrix.
        """
        known = targets_by_name(targets)
        for name, module in self.modules.items():
            if name not in known:
                raise ValueError(
                    f"the plan names {name!r}, which is not one of the {len(known)} matrices of this model; "
                    f"{near_names(name, known)}; rename or remove the entry"
                )
            check_possible(known[name], module)
            if module.directions is not None:
                most = min(known[name].out_features, known[name].in_features)
                if module.directions[-1] >= most:
                    raise ValueError(
                        f"{name}: direction {module.directions[-1] + 1} is named, and the matrix has {most}; correct "
                        "'directions', or remove it to keep the leading ones"
                    )
        missing = [name for name in known if name not in self.modules]
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"the plan says nothing about {missing[0]!r}{others}; add a structure, a rank and an encoding, "
                'or {"structure": "dense", "encoding": "float"} to leave the matrix as it is'
            )

    def bytes(self, targets: Sequence[Target]) -> int:
        """Bytes on disk of all the planned matrices, the dense ones included. Checks the plan first (see `check`)."""
        self.check(targets)
        return sum(planned_bytes(target, self.modules[target.name]) for target in targets)

    def ratio_of(self, targets: Sequence[Target]) -> float:
        """Bytes of the planned matrices over the bytes of the same matrices dense. Checks the plan first."""
        return self.bytes(targets) / sum(target.dense_bytes for target in targets)


def check_possible(target: Target, module: PlannedModule) -> None:
    """Make sure that the matrix can become that, and that factors of that rank are smaller than it.

    Raises:
        ValueError: naming the module, the limit and the remedy.
    """
    m, n, format, rank = target.out_features, target.in_features, module.format, module.rank
    if rank is not None and rank > min(m, n):
        raise ValueError(f"{target.name}: rank {rank} is above {min(m, n)}, the most a {m}x{n} matrix has; lower it")
    reason = format.unsupported_reason(m, n, rank)
    if reason is not None:
        at_no_rank = format.unsupported_reason(m, n) is not None
        remedy = "take another encoding" if at_no_rank else "change the rank"
        raise ValueError(f"{target.name}: {reason}; {remedy}, or leave the matrix as it is")
    if rank is None:
        return
    largest = format.largest_rank_below(target.dense_bytes, m, n, target.element_size)
    if rank > largest:
        remedy = f"use at most {largest}, or " if largest else ""
        raise ValueError(
            f"{target.name}: at rank {rank} the factors of a {m}x{n} matrix in encoding {module.encoding!r} are not "
            f"smaller than the dense matrix; {remedy}leave it as it is (structure 'dense' and encoding 'float' in a "
            "plan, dense: true in an override)"
        )


def bytes_as(target: Target, format: Format, rank: int | None) -> int:
    """Return the bytes on disk of one matrix in a format."""
    return format.bytes(target.out_features, target.in_features, rank, target.element_size)


def planned_bytes(target: Target, module: PlannedModule) -> int:
    """Return the bytes on disk of one matrix as planned."""
    return bytes_as(target, module.format, module.rank)


def _check_version(data: dict[str, Any]) -> None:
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"the plan's format_version is {version!r}; expected {FORMAT_VERSION}; make the plan again")
    if version < FORMAT_VERSION:
        raise ValueError(
            f"the plan's format_version is {version}, which had 'storage' where version {FORMAT_VERSION} has "
            "'structure' and 'encoding'; make the plan again"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"the plan's format_version is {version}, newer than the {FORMAT_VERSION} this version reads; "
            "upgrade optimum-dobisvd"
        )


def _check_object(data: object, what: str) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{what} must be a JSON object, got {data!r:.80}")


def _check_keys(data: dict[str, Any], known: tuple[str, ...], needed: tuple[str, ...], what: str) -> None:
    for key in data:
        if key in _OLD_KEYS and key not in known:
            raise ValueError(f"{what} has the old key {key!r}; write {_OLD_KEYS[key]} instead")
        if key not in known:
            raise ValueError(f"{what} has an unknown key {key!r}; {near_names(str(key), known)}; correct or remove it")
    for key in needed:
        if key not in data:
            raise ValueError(f"{what} has no {key!r}; add it")


def _module_from_dict(name: str, entry: Any) -> PlannedModule:
    _check_object(entry, f"module {name!r}")
    _check_keys(entry, _MODULE_KEYS, ("structure", "encoding"), f"module {name!r}")
    try:
        directions = read_ranges(entry["directions"]) if "directions" in entry else None
        return PlannedModule(entry["structure"], entry["encoding"], entry.get("rank"), directions)
    except ValueError as error:
        raise ValueError(f"module {name!r}: {error}") from error


def _module_to_dict(module: PlannedModule) -> dict[str, Any]:
    entry = module.to_dict()
    return entry if module.directions is None else {**entry, "directions": write_ranges(module.directions)}


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key appear twice and Python keeps the last; in an edited plan that hides a mistake."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} appears twice; keep one of them")
        result[key] = value
    return result
