"""`optimum-cli dobisvd ...` in this process: the same parser and classes, without the seconds that imports take."""

from __future__ import annotations

import hashlib
from pathlib import Path

from optimum.commands.base import RootOptimumCLICommand
from optimum.commands.optimum_cli import register_optimum_cli_subcommand

from optimum_dobisvd.commands.root import DobiSVDCommand


def dobisvd(*arguments: object) -> int:
    """Run a command; returns its exit code."""
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    register_optimum_cli_subcommand(DobiSVDCommand, parent_command=root)
    try:
        parsed = root.parser.parse_args(["dobisvd", *map(str, arguments)])
        parsed.func(parsed).run()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    raise AssertionError("a command always leaves through sys.exit")


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def names_in(folder: Path) -> list[str]:
    """Everything in a folder, hidden things too."""
    return sorted(path.name for path in folder.iterdir())
