"""The folder a compression writes: complete or not there at all, and never in the place of something else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
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


def refuse_losing(out: str, inputs: Iterable[tuple[str, Path]]) -> None:
    """Raise ValueError if writing the folder `out` would delete something that the run reads, with --overwrite or not.

    Paths are compared resolved, those of the files in a folder as well: any of them may be a symbolic link.

    Args:
        out: the folder to write, as the user wrote it.
        inputs: what is read, in words that name the option, and its path, which need not exist.
    """
    target = Path(out).expanduser().resolve()
    if target.is_file() or Path.cwd().is_relative_to(target):
        return  # `check_target` refuses these whatever they hold
    for words, given in inputs:
        path = given.expanduser()
        held = path.resolve()
        kept = "--overwrite does not change that; name another folder"
        if held == target:
            raise ValueError(f"{out} is {words} itself, which would be deleted: {kept}")
        linked = [child.resolve() for child in path.iterdir() if child.is_symlink()] if path.is_dir() else []
        if any(part.is_relative_to(target) for part in (held, *linked)):
            raise ValueError(f"{out} holds {words}, which would be deleted with it: {kept}")
        if target.is_relative_to(held) and _holds_files_of_others(target):
            raise ValueError(
                f"{out} is a part of {words} and was not written by this command ({RECIPE_NAME} is missing): {kept}"
            )


def _holds_files_of_others(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir()) and files_listed(folder) is None


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
