"""Saving a compressed model: all or nothing, and readable without this package."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..model.substitutions import originals
from ..structures.base import compressed_linears, restore_tensors
from .auto_classes import auto_classes
from .bundle import MODELING_FILE, modeling_source
from .folder import link_or_copy, staging_folder
from .loading import BUNDLED_ENTRY, OWN_CODE, adapted_modules, forget_bundled_loader
from .verify import saved_as_it_is

DOCUMENTS = ("dobisvd_plan", "dobisvd_report", "dobisvd_training", "dobisvd_documents")
"""What a compression in this process left on the model: plan, report, curve, and what writes them into a folder."""
_HUB_ARGUMENTS = ("repo_id", "private", "token", "revision", "commit_message", "commit_description", "create_pr")


def with_safe_save(model: Any) -> None:
    """Give the model a `save_pretrained` that writes beside the folder and puts it in place when it is whole.

    On the instance and not on a subclass, because transformers writes the class name into config.json.
    """
    if "save_pretrained" not in model.__dict__:
        model.save_pretrained = functools.partial(save_compressed, model)


def without_safe_save(model: Any) -> None:
    """Undo `with_safe_save`: a dense model again, with transformers' own save and nothing of ours in its config."""
    for name in ("save_pretrained", "dobisvd_is_new", *DOCUMENTS):
        model.__dict__.pop(name, None)
    forget_bundled_loader(model.config)


def save_compressed(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """transformers' `save_pretrained`, its arguments, into a folder that replaces `save_directory` when it is whole.

    Other files of an existing folder (a tokenizer, say) are kept. A crash, a kill or a full disk leaves the old folder
    as it was. `modeling_dobisvd.py` and its `auto_map` entries are added, and plan and report where they are known. Of
    a model with an adapter (`add_adapter`) transformers saves the adapter alone, and nothing is added.

    Raises:
        ValueError: `save_directory` is a file, the weights lie inside layers of PEFT, or a kernel has repacked them.
    """
    target = Path(os.path.realpath(save_directory))
    if target.is_file():
        raise ValueError(f"{target} is a file; name a folder")
    with originals(model):
        _save_whole(model, save_directory, target, args, kwargs)


def _save_whole(
    model: Any, save_directory: str | os.PathLike[str], target: Path, args: tuple, kwargs: dict[str, Any]
) -> None:
    """`save_compressed` of a model in whose modules' places nothing else stands."""
    adapter_only = getattr(model, "_hf_peft_config_loaded", False)
    if not adapter_only:
        _refuse_layers_of_peft(model)
        restore_tensors(compressed_linears(model), model.hf_quantizer.encodings)
    original = type(model).save_pretrained
    arguments = _by_name(original, model, target, args, kwargs)
    if not arguments.get("is_main_process", True):
        # It takes part in gathering. Early versions of transformers 5 write the weights on every process all the same.
        target.parent.mkdir(parents=True, exist_ok=True)
        discarded = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.discarded-")
        with discarded as elsewhere, saved_as_it_is(model):
            original(model, elsewhere, *args, **kwargs)
        return
    push = arguments.pop("push_to_hub", False)
    arguments.pop("save_directory")
    with staging_folder(target) as stage:
        _declare_bundled_loader(model)
        model.hf_quantizer.state_dict_to_save = arguments.get("state_dict")
        try:
            with saved_as_it_is(model):
                original(model, stage, **arguments)
        finally:
            model.hf_quantizer.state_dict_to_save = None
        if not adapter_only:
            _put_before_own_code(stage)
            (stage / MODELING_FILE).write_text(modeling_source(), encoding="utf-8")
            write_documents = getattr(model, "dobisvd_documents", None)
            if write_documents is not None:
                write_documents(stage)
        written = sorted(path.name for path in stage.iterdir())
        _carry_over(target, stage, set(written), arguments.get("variant"))
    if not adapter_only and getattr(model, "dobisvd_is_new", False):
        # Made in this process, so until now it was another checkpoint's. PEFT writes it into adapters.
        model.name_or_path = os.fspath(save_directory)
    if push:
        _upload(target, written, {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs})


def _refuse_layers_of_peft(model: Any) -> None:
    """transformers would write their names into the checkpoint, and nothing could load it."""
    wrapped = adapted_modules(model)
    if wrapped:
        raise ValueError(
            f"{wrapped[0]} and {len(wrapped) - 1} other modules are layers of PEFT, and a checkpoint with such layers "
            "cannot be loaded: save what merge_and_unload() or unload() of the PeftModel returns; after "
            "delete_adapter, load the model anew"
        )


def _by_name(original: Any, model: Any, target: Path, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, however they were given."""
    bound = inspect.signature(original).bind(model, target, *args, **kwargs).arguments
    named = {key: value for key, value in bound.items() if key not in ("self", "kwargs")}
    return {**named, **bound.get("kwargs", {})}


def _declare_bundled_loader(model: Any) -> None:
    """Name the bundled loader in config.json for every auto class that could load this architecture."""
    auto_map = dict(getattr(model.config, "auto_map", None) or {})
    for auto_class, _ in auto_classes(model.config):
        name = auto_class.__name__
        auto_map[name] = f"{MODELING_FILE.removesuffix('.py')}.{BUNDLED_ENTRY}{name}"
    model.config.auto_map = auto_map


def _put_before_own_code(folder: Path) -> None:
    """Have the loader called before the model's own code, which transformers names in config.json while it saves."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    auto_map, loader = values.get("auto_map") or {}, MODELING_FILE.removesuffix(".py")
    own = [key for key in auto_map if key.startswith("AutoModel") and not str(auto_map[key]).startswith(f"{loader}.")]
    if own:
        for key in own:
            auto_map[f"{OWN_CODE}{key}"] = auto_map[key]
            auto_map[key] = f"{loader}.{BUNDLED_ENTRY}{key}"
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _carry_over(old: Path, new: Path, written: set[str], variant: str | None) -> None:
    """Bring the old folder's other files along.

    Weights are replaced as a set, however many shards they had, and with them what belonged to them alone: plan,
    report, pictures, an adapter. Nothing of that happens where only an adapter was saved.
    """
    if not old.is_dir():
        return
    stem = re.escape("model" if variant is None else f"model.{variant}")
    weights = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index(\.\w+)?\.json)?")
    replaced = any(weights.fullmatch(name) for name in written)
    for path in old.iterdir():
        stale = replaced and (weights.fullmatch(path.name) or path.name.startswith(("dobisvd_", "adapter_")))
        if path.name in written or stale or path.name.startswith(f".{old.name}.saving-"):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, copy_function=link_or_copy, symlinks=True)
        else:
            link_or_copy(path, new / path.name)


def _upload(folder: Path, names: list[str], arguments: dict[str, Any]) -> None:
    """Push the files just written, and no others, as transformers does."""
    from huggingface_hub import HfApi

    api = HfApi(token=arguments.pop("token", None))
    private = arguments.pop("private", None)
    repo = api.create_repo(arguments.pop("repo_id", folder.name), exist_ok=True, private=private).repo_id
    arguments.setdefault("commit_message", "Upload model compressed with optimum-dobisvd")
    api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=names, **arguments)
