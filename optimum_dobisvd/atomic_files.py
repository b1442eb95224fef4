"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, rename it into place. On an error nothing is left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~umask())  # what open() would have given; mkstemp is private
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def umask() -> int:
    """Return the process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """`write_atomically` for text in UTF-8."""
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))
