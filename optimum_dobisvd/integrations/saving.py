"""Saving a compressed model: all or nothing, readable without this package, and never readable as something else."""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import low_rank_linear
from ..nn.low_rank_linear import LowRankLinear
from . import remote_code

MODELING_FILE = "modeling_dobisvd.py"
_AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM")


def tripwire_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A zero-size tensor under every dense weight's old name.

    A reader that does not know the format would build the dense model, find no weights and fill them at random with a
    warning. With these it finds a weight of the wrong size, and stops.
    """
    return {f"{name}.weight": torch.empty(0) for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def modeling_source() -> str:
    """`modeling_dobisvd.py`: this package's module and loader in one file that needs torch and transformers only."""
    layer = inspect.getsource(low_rank_linear)
    loader = inspect.getsource(remote_code)
    _, _, loader = loader.partition("# --- bundled from here ---\n")
    head = (
        '"""Loads a low-rank compressed checkpoint where optimum-dobisvd is not installed (trust_remote_code=True).\n\n'
        'Written by optimum-dobisvd when it saved this checkpoint. Apache-2.0.\n"""\n'
    )
    future = "from __future__ import annotations\n"
    layer = layer.partition(future)[2]
    return head + future + layer + "\n\n" + loader


def with_safe_save(model: nn.Module) -> None:
    """Give the model a `save_pretrained` that writes beside the folder and puts it in place when it is whole.

    On the instance and not on a subclass, because transformers writes the class name into config.json.
    """
    if "save_pretrained" in model.__dict__:
        return
    model.save_pretrained = functools.partial(save_compressed, model)  # type: ignore[assignment]


def save_compressed(model: nn.Module, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """transformers' `save_pretrained` into a folder beside `save_directory`, then swapped in as one.

    Other files of an existing folder (a tokenizer, say) are kept. A crash, a kill or a full disk leaves the old folder as
    it was. `modeling_dobisvd.py` and its `auto_map` entry are added.
    """
    target = Path(os.fspath(save_directory))
    if target.is_file():
        raise ValueError(f"{target} is a file; name a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    push = kwargs.pop("push_to_hub", False)
    original = type(model).save_pretrained
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
    try:
        _declare_remote_code(model)
        original(model, beside, *args, **kwargs)
        (beside / MODELING_FILE).write_text(modeling_source(), encoding="utf-8")
        written = {path.name for path in beside.iterdir()}
        _carry_over(target, beside, written)
        _flush(beside)
        os.chmod(beside, 0o755)
        _swap_in(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if push:
        hub = {key: kwargs[key] for key in ("token", "commit_message", "create_pr") if key in kwargs}
        _upload(target, kwargs.get("repo_id", target.name), **hub)
    return None


def _declare_remote_code(model: nn.Module) -> None:
    auto_map = dict(getattr(model.config, "auto_map", None) or {})  # type: ignore[union-attr]
    for auto_class in _AUTO_CLASSES:
        auto_map[auto_class] = f"{MODELING_FILE.removesuffix('.py')}.{remote_code.DobiSVDModel.__name__}"
    model.config.auto_map = auto_map  # type: ignore[union-attr]


def _carry_over(old: Path, new: Path, written: set[str]) -> None:
    """Bring the old folder's other files along; its weights are replaced as a set, however many shards it had."""
    if not old.is_dir():
        return
    for path in old.iterdir():
        if path.name in written or path.name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, copy_function=_link_or_copy, symlinks=True)
        else:
            _link_or_copy(path, new / path.name)


def _link_or_copy(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _swap_in(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`. Afterwards `new` holds the old folder's files, or is gone."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.rename(target, retired)
        os.rename(new, target)
        shutil.rmtree(retired, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, where the kernel can (Linux, renameat2 with RENAME_EXCHANGE)."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _upload(folder: Path, repo_id: str, token: Any = None, commit_message: str | None = None, create_pr: bool = False) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, exist_ok=True).repo_id
    message = commit_message or "Upload model compressed with optimum-dobisvd"
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, create_pr=create_pr)
