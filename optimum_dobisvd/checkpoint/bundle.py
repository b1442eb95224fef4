"""The loader that every checkpoint carries: this package's modules that it needs, in one file."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from pathlib import Path

MODELING_FILE = "modeling_dobisvd.py"
_ROOT = Path(__file__).parent.parent
_ENTRY = Path("checkpoint", "bundled_entry.py")
_HEAD = '''"""Loads this low-rank checkpoint where optimum-dobisvd is not installed (trust_remote_code=True).

Written by optimum-dobisvd when it saved the checkpoint. Apache-2.0.
"""

from __future__ import annotations
'''


@functools.cache
def modeling_source() -> str:
    """Return `modeling_dobisvd.py`: the loader and all it imports of this package; it needs torch and transformers.

    Modules stand in the order in which they need each other, their imports of each other taken out, in one namespace.

    Raises:
        ValueError: two of them define the same name.
    """
    modules = bundled_modules()
    _check_names(modules)
    parts = [_HEAD]
    for path in modules:
        source = (_ROOT / path).read_text(encoding="utf-8")
        lines = source.splitlines()
        for statement in reversed(ast.parse(source).body):
            if isinstance(statement, ast.ImportFrom) and (statement.level or statement.module == "__future__"):
                del lines[statement.lineno - 1 : statement.end_lineno]
        parts.append("\n".join(lines) + "\n")
    return "\n\n".join(parts)


def bundled_modules() -> list[Path]:
    """Return the files of the package that the entry imports, each after those that it imports itself."""
    found: dict[Path, None] = {}
    _visit(_ENTRY, found)
    return list(found)


def _visit(path: Path, found: dict[Path, None]) -> None:
    for imported in _imports(path):
        if imported not in found:
            _visit(imported, found)
    found[path] = None


def _imports(path: Path) -> list[Path]:
    """The modules that one imports by its own statements, relative to the package's root."""
    paths = []
    for statement in ast.parse((_ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom) and statement.level:
            folder = path.parents[statement.level - 1]
            paths.append(folder.joinpath(*(statement.module or "").split(".")).with_suffix(".py"))
    return paths


def _check_names(modules: list[Path]) -> None:
    owners: dict[str, Path] = {}
    for path in modules:
        for name, count in _defined(path).items():
            if name in owners or count > 1:
                raise ValueError(
                    f"{path} and {owners.get(name, path)} both define {name}, and they are bundled in one file"
                )
            owners[name] = path


def _defined(path: Path) -> Counter[str]:
    """The names that a module defines, imports left out."""
    names: Counter[str] = Counter()
    for statement in ast.parse((_ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names[statement.name] += 1
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names
