"""The loader that every checkpoint carries: this package's modules that it needs, in one file."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
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
        lines = (_ROOT / path).read_text(encoding="utf-8").splitlines()
        for statement in reversed(_statements(path)):
            if isinstance(statement, ast.ImportFrom) and (statement.level or statement.module == "__future__"):
                del lines[statement.lineno - 1 : statement.end_lineno]
        parts.append("\n".join(lines) + "\n")
    return "\n\n".join(parts)


def bundled_modules() -> list[Path]:
    """Return the files of the package that the entry imports, each after those that it imports itself."""
    found: dict[Path, None] = {}

    def visit(path: Path) -> None:
        for statement in _statements(path):
            if isinstance(statement, ast.ImportFrom) and statement.level:
                folder = path.parents[statement.level - 1]
                imported = folder.joinpath(*(statement.module or "").split(".")).with_suffix(".py")
                if imported not in found:
                    visit(imported)
        found[path] = None

    visit(_ENTRY)
    return list(found)


def _check_names(modules: list[Path]) -> None:
    owners: dict[str, Path] = {}
    for path in modules:
        for name in _defined(path):
            if name in owners:
                raise ValueError(f"{path} and {owners[name]} both define {name}, and they are bundled in one file")
            owners[name] = path


def _defined(path: Path) -> Iterator[str]:
    """The names that a module defines, imports left out."""
    for statement in _statements(path):
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _statements(path: Path) -> list[ast.stmt]:
    return ast.parse((_ROOT / path).read_text(encoding="utf-8")).body
