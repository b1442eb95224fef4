"""The folder a compression writes: complete or not there at all, and never in the place of something else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.folder import staging_folder
from .saved_recipe import RECIPE_NAME, files_listed


def check_target(out: str, overwrite: bool) -> Path:
    """Return the folder to write, resolved, after making sure that writing it destroys nothing unasked.

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
    """Yield a path, not there yet, to write the output to; it takes the place of `target` when the body is through.

    On an error nothing is left. A killed process leaves one hidden folder beside `target`, which the next run removes.
    """
    with staging_folder(target) as stage:
        # One level down, because `save_pretrained` stages beside the folder it is given: that has to be inside, too.
        new = stage / "new"
        yield new
        for path in new.iterdir():
            path.rename(stage / path.name)
        new.rmdir()
