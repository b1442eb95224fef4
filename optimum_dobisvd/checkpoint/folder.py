"""A folder of files replaced as one: written beside the old one, and put in its place when it is whole."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..atomic_files import umask

_LAST = "config.json"  # what readers look at first is replaced last


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `target` at the end of the context, or is removed if that fails.

    Beside the target, where one rename puts it in place. A target that cannot be renamed (a mount point, the working
    directory, a folder whose parent is not writable) is staged inside itself and replaced file by file.
    """
    inside = not _can_be_renamed(target)
    parent = target if inside else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.saving-"
    _remove_leftovers(parent, prefix)
    stage = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
    try:
        yield stage
        for path in stage.iterdir():
            if path.is_file() and not path.is_symlink():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        os.chmod(stage, target.stat().st_mode & 0o7777 if target.exists() else 0o777 & ~umask())
        if inside:
            _move_files(stage, target)
        else:
            swap_in(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def link_or_copy(source: str | Path, destination: str | Path) -> None:
    """The same file under another name, where the file system can; otherwise a copy. Symbolic links stay links."""
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def swap_in(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`. Afterwards `new` holds the old folder's files, or is gone."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        try:
            os.rename(target, retired)
            os.rename(new, target)
        finally:
            if target.exists():
                shutil.rmtree(retired, ignore_errors=True)


def _can_be_renamed(target: Path) -> bool:
    if not target.exists():
        return True
    in_use = target.is_mount() or Path.cwd().is_relative_to(target)
    return not in_use and os.access(target.parent, os.W_OK | os.X_OK)


def _move_files(stage: Path, target: Path) -> None:
    """Files over files, `config.json` last; then what the staged folder no longer has is removed."""
    names = sorted((path.name for path in stage.iterdir()), key=lambda name: (name == _LAST, name))
    for name in names:
        if (target / name).is_dir() and not (target / name).is_symlink():
            continue  # carried over: it is the same folder
        os.replace(stage / name, target / name)
    for path in target.iterdir():
        if path.name not in names and path != stage and path.is_file():
            path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, where the kernel can (Linux, renameat2 with RENAME_EXCHANGE)."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove what killed processes left; their process number is in the name."""
    for path in parent.glob(f"{glob.escape(prefix)}*-*"):
        process = path.name.removeprefix(prefix).partition("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)
