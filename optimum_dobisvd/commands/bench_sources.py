"""Where the models of a benchmark come from, and what loads them in another process."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..benchmark.synthetic import SyntheticModel, offloaded
from ..encodings.base import QUANT_METHOD
from ..model.footprint import checkpoint_bytes
from .dense_source import dense_source, quant_method
from .load_dense import load_dense, load_meta_model
from .machine import available_memory
from .sources import ModelSource, model_source

_WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass
class Models:
    """What is to be loaded.

    Attributes:
        title: what is measured.
        meta: the dense model, or the checkpoint's architecture, on meta.
        dtype: of all models.
        loads: by name, what loads each; takes `device`, `limit` and `folder` (see `_load`).
        files: by name, what it reads.
        bytes: by name, of its weights as far as they are known.
        notes: sentences for the user.
    """

    title: str
    meta: Any
    dtype: torch.dtype
    loads: Mapping[str, Callable[..., Any]]
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def synthetic_models(options: dict[str, Any]) -> Models:
    """Random weights; their sizes are checked here."""
    dtype = torch.bfloat16 if options["dtype"] == "auto" else getattr(torch, options["dtype"])
    wanted = SyntheticModel(
        options["synthetic"], options["shape"], dtype, options["structure"], options["quantization"], options["keep"]
    )
    if wanted.format.structure.has_rank and wanted.keep is None:
        wanted = replace(wanted, keep=0.5)
    meta, compressed = wanted.meta(), wanted.compressed_bytes()
    kept = "" if wanted.keep is None else f", keep {wanted.keep:g}"
    title = f"{wanted.shape} of random weights, {wanted.structure} {wanted.format.encoding.name}{kept}"
    loads = {"dense": partial(_make, wanted.dense), "checkpoint": partial(_make, wanted.compressed)}
    sizes = {"dense": checkpoint_bytes(meta), "checkpoint": compressed}
    return Models(title, meta, dtype, loads, bytes=sizes)


def checkpoint_models(options: dict[str, Any]) -> Models:
    """A checkpoint and the dense model that it was made from, if that can be found."""
    out, trust = options["out"], options["trust_remote_code"]
    source = model_source(out)
    meta = load_meta_model(source, dtype=options["dtype"], trust_remote_code=trust)
    if quant_method(source) != QUANT_METHOD:
        raise ValueError(f"{out} was not compressed by optimum-dobisvd; name a checkpoint of its own, and see --dense")
    _require_continuation(meta, out)
    dtype = next(meta.parameters()).dtype
    loads: dict[str, Callable[..., Any]] = {}
    models = Models(out, meta, dtype, loads)
    found = dense_source(out, options["dense"])
    if found.source is None:
        models.notes.append(f"{found.note}: the compressed model is measured alone; pass --dense")
    else:
        try:
            load_meta_model(found.source, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            if options["dense"] is not None:
                raise
            why = " ".join(str(error).split())[:300]
            models.notes.append(
                f"the dense model {found.source.typed} cannot be loaded, so the compressed one is measured alone; "
                f"pass --dense: {why}"
            )
            found = replace(found, source=None)
    for name, each in (("dense", found.source), ("checkpoint", source)):
        if each is not None:
            loads[name] = partial(_load, each, str(dtype).removeprefix("torch."), trust)
            models.files[name] = files = _files_of(each)
            models.bytes[name] = sum(os.path.getsize(file) for file in files)
            if not files:
                models.notes.append(f"{each.typed} is not on this machine yet: its loading is not timed")
    if "dense" in loads:
        models.bytes["dense"] = checkpoint_bytes(meta)
    return models


def _require_continuation(model: Any, name: str) -> None:
    """Raise ValueError for a model that does not continue a text token by token."""
    if not getattr(model, "can_generate", lambda: False)() or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is a {type(model).__name__}; bench is for models that continue a text")


def _files_of(source: ModelSource) -> tuple[str, ...]:
    """The files of weights of a model that is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(source.location).expanduser()
    if source.gguf_file is not None:
        return (str(folder / source.gguf_file),)
    if not folder.is_dir():
        cached = try_to_load_from_cache(source.location, "config.json")
        if not isinstance(cached, str):
            return ()
        folder = Path(cached).parent
    return tuple(
        file for pattern in _WEIGHT_FILES for file in sorted(glob.glob(f"{glob.escape(str(folder))}/{pattern}"))
    )


# What loads them, in another process.


def _load(source: ModelSource, dtype: str, trust: bool, device: str, limit: int | None, folder: str | None) -> Any:
    """A checkpoint; beyond `limit` bytes on the device its weights are offloaded."""
    placement: dict[str, Any] = {}
    device_map = device
    if limit is not None:
        on_cpu = torch.device(device).type == "cpu"
        most = {"cpu": limit} if on_cpu else {torch.device(device).index or 0: limit, "cpu": available_memory()}
        placement, device_map = {"max_memory": most, "offload_folder": folder}, "auto"
    return load_dense(source, dtype=dtype, device_map=device_map, trust_remote_code=trust, placement=placement)


def _make(make: Callable[[str], Any], device: str, limit: int | None, folder: str | None) -> Any:
    """A model of random weights."""
    if limit is None:
        return make(device)
    return offloaded(make("cpu"), device, limit, str(folder))
