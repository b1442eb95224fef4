"""The folder a compression writes: there as a whole or not at all, and never in the place of something else."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..storage.folder import swap_in
from .saved_recipe import RECIPE_NAME, files_listed


def check_target(out: str, overwrite: bool) -> Path:
    """The folder to write, resolved, after making sure that writing it destroys nothing unasked.

    Raises:
        ValueError: it is a file, holds the working directory, or holds files that an earlier run did not write.
    """
    target = Path(out).expanduser().resolve()
    if target.is_file():
        raise ValueError(f"{out} is a file; name a new folder")
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"{out} is the working directory or holds it; name a folder below it")
    if overwrite or not target.is_dir() or not any(target.iterdir()):
        return target
    ours = files_listed(target)
    if ours is None:
        raise ValueError(
            f"{out} is not empty and was not written by this command ({RECIPE_NAME} is missing); name another folder, "
            "or pass --overwrite to delete everything in it"
        )
    foreign = sorted(path.name for path in target.iterdir() if path.name not in ours)
    if foreign:
        raise ValueError(
            f"{out} is an earlier output, but {foreign[0]} in it was put there by someone else; move it away, or pass "
            "--overwrite to delete it too"
        )
    return target


@contextlib.contextmanager
def staged_output(target: Path) -> Iterator[Path]:
    """Yields a path, not there yet, to write the output to; it takes the place of `target` when the body is through.

    On an error nothing is left. A killed process leaves one hidden folder beside `target`, which the next run removes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{target.name}.compressing-{socket.gethostname()}-"
    _remove_leftovers(target.parent, mark)
    staging = Path(tempfile.mkdtemp(prefix=f"{mark}{os.getpid()}-", dir=target.parent))
    try:
        new = staging / target.name
        yield new
        swap_in(new, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_leftovers(folder: Path, mark: str) -> None:
    """Staging folders of processes of this machine that are gone."""
    for path in folder.iterdir():
        pid = path.name.removeprefix(mark).partition("-")[0]
        if path.name.startswith(mark) and pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
