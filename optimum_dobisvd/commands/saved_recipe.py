"""The recipe that is saved beside every checkpoint: every option as it was resolved, to run the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..atomic_files import write_text_atomically
from .options import CommandSpec

RECIPE_NAME = "dobisvd_recipe.yaml"
_HEAD = "# How this checkpoint was made. To make it again: optimum-cli dobisvd run {name}\n"


def save_recipe(
    folder: Path, spec: CommandSpec, options: dict[str, Any], compressed_with: dict[str, Any] | None = None
) -> None:
    """Write `dobisvd_recipe.yaml` into a folder that holds everything else already.

    `compressed_with` are the options of the compress step before it, where there was one.

    Beside the step, it records the versions that took part and the names of all files in the folder, by which a later
    run tells an earlier output from anything else.
    """
    import torch
    import transformers

    from .. import __version__

    transient = {option.key for option in spec.options if option.transient}
    content = {
        "versions": {
            "optimum_dobisvd": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "steps": [
            *([{"compress": compressed_with}] if compressed_with else []),
            {spec.name: {key: value for key, value in options.items() if key not in transient}},
        ],
        "files": sorted({path.name for path in folder.iterdir()} | {RECIPE_NAME}),
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=119)
    write_text_atomically(folder / RECIPE_NAME, _HEAD.format(name=RECIPE_NAME) + text)


def files_listed(folder: Path) -> set[str] | None:
    """The files that the run which wrote this folder wrote; None if none did."""
    content = _read(folder)
    files = content.get("files") if content is not None else None
    return {str(name) for name in files} if isinstance(files, list) else None


def compress_options(folder: Path) -> dict[str, Any] | None:
    """The options of the compress step that wrote this folder; None where there is no such record."""
    content = _read(folder)
    try:
        return dict(content["steps"][0]["compress"])  # type: ignore[index]
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load((folder / RECIPE_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
