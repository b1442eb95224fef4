"""Tasks of lm-eval: its own, whose data come from the hub, or the same on files in a folder."""

from __future__ import annotations

import difflib
import importlib.util
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path("recipes", "tasks")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data in memory, ready for any number of models.

    `manager` is lm-eval's `TaskManager`; `members` are its `Task` and `Group` objects, by the names of their results.
    """

    manager: Any
    members: dict[str, Any]


def load_tasks(names: Sequence[str], data_dir: str | None = None) -> LoadedTasks:
    """Load tasks by the names they have in lm-eval, before any model is.

    Args:
        names: tasks, groups such as mmlu, or tags, which stand for several tasks. A name given twice counts once.
        data_dir: a folder with the files that the YAMLs of `recipes/tasks` name; every task must then be one of those.
            None leaves the data to lm-eval, which has them from the hub.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown name (tells near ones), a task both alone and in a group, or a file with other content.
        FileNotFoundError: the folder or a task's file is not there.
        ConnectionError: a dataset is neither cached nor reachable.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("lm-eval is not installed, and tasks run through it: pip install 'optimum-dobisvd[eval]'")
    from .quiet import quiet_lm_eval

    names = list(dict.fromkeys(names))
    with quiet_lm_eval():
        loaded = _from_hub(names) if data_dir is None else _from_files(names, data_dir)
        loaded.manager.load(list(loaded.members.values()))  # refuses a task that is also part of a group
    return loaded


def local_task_files() -> dict[str, Path]:
    """The YAML of every task that reads local files, by the name that lm-eval's own task of this kind has.

    A wheel carries the folder inside the package, a checkout beside it.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / _FOLDER, package.parent / _FOLDER):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    raise FileNotFoundError(f"{package / _FOLDER} is missing: the installation is damaged; install the package again")


def _from_hub(names: list[str]) -> LoadedTasks:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            hint = _near(name, manager.all_tasks) or "`lm_eval ls tasks` lists them"
            raise ValueError(f"lm-eval has no task {name!r}; {hint}")
    members: dict[str, Any] = {}
    for name in names:
        try:
            members |= _members(name, manager.load([name]))
        except OSError as error:
            raise ConnectionError(
                f"the data of the task {name} cannot be had: {error}; {_offline_remedy(name)}"
            ) from error
    return LoadedTasks(manager, members)


def _members(name: str, loaded: Any) -> dict[str, Any]:
    """Return a group that has a figure of its own as itself; any other, and a tag, as its tasks."""
    groups = loaded.get("groups", {})
    if name in groups:
        return _with_figures(name, groups[name])
    return dict(loaded["tasks"])


def _with_figures(name: str, member: Any) -> dict[str, Any]:
    if getattr(member, "has_aggregation", True):  # tasks have no such attribute
        return {name: member}
    return {key: each for child in member for key, each in _with_figures(_name_of(child), child).items()}


def _name_of(member: Any) -> str:
    return str(member.task_name if hasattr(member, "task_name") else member.name)


def _offline_remedy(name: str) -> str:
    local = local_task_files()
    once = "load it once with access to the hub, from then on it is cached"
    if name not in local:
        return f"{once} (of local files, --data-dir, there are only {', '.join(local)})"
    files = ", ".join(_data_files(local[name]).values())
    return f"{once}, or pass --data-dir with a folder that holds {files}"


def _from_files(names: list[str], data_dir: str) -> LoadedTasks:
    """The tasks of `recipes/tasks`, under lm-eval's names for them, on files in `data_dir`."""
    from lm_eval.tasks import TaskManager

    known = local_task_files()
    folder = Path(data_dir).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"--data-dir {data_dir}: there is no such folder")
    overlays = {name: _overlay(name, known, folder) for name in names}
    members: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, overlay in overlays.items():
            Path(scratch, f"{name}.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
        manager = TaskManager(include_path=scratch, include_defaults=False)
        for name, overlay in overlays.items():
            try:
                members |= _members(name, manager.load([name]))
            except Exception as error:  # any kind, by what is wrong with the rows; none of them names the file
                files = ", ".join(overlay["dataset_kwargs"]["data_files"].values())
                raise ValueError(
                    f"the task {name} cannot use {files}: {type(error).__name__}: {error}; {known[name]} says what a "
                    "line must have"
                ) from error
    return LoadedTasks(manager, members)


def _overlay(name: str, known: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Return what changes in a task's YAML: its name, and where its files are."""
    if name not in known:
        hint = _near(name, known) or f"there are: {', '.join(known)}"
        raise ValueError(f"no task {name!r} reads local files; {hint} (without --data-dir tasks come from the hub)")
    files = {split: folder / file for split, file in _data_files(known[name]).items()}
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(
                f"the task {name} reads {path}, which is not there: put it there ({known[name]} says what is in it), "
                "or leave out --data-dir to have the task from the hub"
            )
    return {
        "include": str(known[name]),
        "task": name,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
    }


def _near(name: str, known: Iterable[str]) -> str:
    """The names that were probably meant, as a question; empty where none is near."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


class _FunctionsAsText(yaml.SafeLoader):
    """A loader that reads lm-eval's tag `!function` as the text behind it."""


_FunctionsAsText.add_constructor("!function", lambda loader, node: node.value)


def _data_files(task_file: Path) -> dict[str, str]:
    """The files that a task's YAML names, by split."""
    content = yaml.load(task_file.read_text(encoding="utf-8"), Loader=_FunctionsAsText)
    return content["dataset_kwargs"]["data_files"]
