"""Saving a compressed model: all or nothing, readable without this package, and never readable as something else."""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..nn.low_rank_linear import LowRankLinear
from ..report.write import write_beside

MODELING_FILE = "modeling_dobisvd.py"
# In the order in which they need each other.
_BUNDLED = (
    "nn/low_rank_linear.py",
    "nn/dense_linear.py",
    "integrations/checkpoint.py",
    "integrations/loading.py",
    "integrations/bundled_entry.py",
)
_BUNDLE_HEAD = '''"""Loads this low-rank checkpoint where optimum-dobisvd is not installed (trust_remote_code=True).

Written by optimum-dobisvd when it saved the checkpoint. Apache-2.0.
"""

from __future__ import annotations
'''
_ENTRY = "DobiSVDModel"
_AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM")


def tripwire_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A zero-size tensor under every dense weight's old name.

    A reader that does not know the format would build the dense model, find no weights and fill them at random with a
    warning. With these it finds a weight of the wrong size, and stops.
    """
    return {
        f"{name}.weight": torch.empty(0) for name, module in model.named_modules() if isinstance(module, LowRankLinear)
    }


def modeling_source() -> str:
    """`modeling_dobisvd.py`: this package's modules and loader in one file that needs torch and transformers only."""
    root = Path(__file__).parent.parent
    parts = [_BUNDLE_HEAD]
    for name in _BUNDLED:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if not line.startswith(("from .", "from __future__"))]
        parts.append("\n".join(kept) + "\n")
    return "\n\n".join(parts)


def with_safe_save(model: Any) -> None:
    """Give the model a `save_pretrained` that writes beside the folder and puts it in place when it is whole.

    On the instance and not on a subclass, because transformers writes the class name into config.json.
    """
    if "save_pretrained" in model.__dict__:
        return
    model.save_pretrained = functools.partial(save_compressed, model)


def without_safe_save(model: Any) -> None:
    """Undo `with_safe_save`: a dense model again, with transformers' own save and nothing of ours in its config."""
    model.__dict__.pop("save_pretrained", None)
    auto_map = getattr(model.config, "auto_map", None) or {}
    kept = {key: value for key, value in auto_map.items() if not str(value).endswith(f".{_ENTRY}")}
    if kept:
        model.config.auto_map = kept
    elif auto_map:
        del model.config.auto_map


def save_compressed(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """transformers' `save_pretrained` into a folder beside `save_directory`, then swapped in as one.

    Other files of an existing folder (a tokenizer, say) are kept. A crash, a kill or a full disk leaves the old folder
    as it was. `modeling_dobisvd.py` and its `auto_map` entry are added.
    """
    target = Path(os.fspath(save_directory))
    if target.is_file():
        raise ValueError(f"{target} is a file; name a folder")
    original = type(model).save_pretrained
    if not (args[0] if args else kwargs.get("is_main_process", True)):
        return original(model, target, *args, **kwargs)  # takes part in gathering, writes nothing
    target.parent.mkdir(parents=True, exist_ok=True)
    push = kwargs.pop("push_to_hub", False)
    _remove_leftovers(target)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-{os.getpid()}-", dir=target.parent))
    try:
        _declare_remote_code(model)
        original(model, beside, *args, **kwargs)
        (beside / MODELING_FILE).write_text(modeling_source(), encoding="utf-8")
        if getattr(model, "dobisvd_report", None) is not None:
            write_beside(beside, model.dobisvd_plan, model.dobisvd_report, pictures=False)
        written = {path.name for path in beside.iterdir()}
        _carry_over(target, beside, written)
        _flush(beside)
        os.chmod(beside, 0o755)
        swap_in(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if push:
        hub = {key: kwargs[key] for key in ("token", "commit_message", "create_pr") if key in kwargs}
        _upload(target, kwargs.get("repo_id", target.name), **hub)
    return None


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside the target; their process number is in the name."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.saving-*-*"):
        process = path.name.removeprefix(f".{target.name}.saving-").partition("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _declare_remote_code(model: Any) -> None:
    auto_map = dict(getattr(model.config, "auto_map", None) or {})
    for auto_class in _AUTO_CLASSES:
        auto_map[auto_class] = f"{MODELING_FILE.removesuffix('.py')}.{_ENTRY}"
    model.config.auto_map = auto_map


def _carry_over(old: Path, new: Path, written: set[str]) -> None:
    """Bring the old folder's other files along; its weights are replaced as a set, however many shards it had."""
    if not old.is_dir():
        return
    replaced = any(_is_weights(name) for name in written)  # not so where only an adapter was saved
    for path in old.iterdir():
        # Plan and report go with the weights they are of.
        if path.name in written or (replaced and (_is_weights(path.name) or path.name.startswith("dobisvd_"))):
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, copy_function=_link_or_copy, symlinks=True)
        else:
            _link_or_copy(path, new / path.name)


def _is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


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


def swap_in(new: Path, target: Path) -> None:
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


def _upload(
    folder: Path, repo_id: str, token: Any = None, commit_message: str | None = None, create_pr: bool = False
) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, exist_ok=True).repo_id
    message = commit_message or "Upload model compressed with optimum-dobisvd"
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, create_pr=create_pr)
