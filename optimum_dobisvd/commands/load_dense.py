"""Dense models, and the same on meta, ready to be compressed and saved."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.auto_classes import auto_class_of
from ..model.device import require_device
from .sources import ModelSource

_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # by accelerate, whatever devices there are
DTYPES = ("auto", "float32", "bfloat16", "float16")
_KEPT_BYTES = 1 << 30
"""Up to this size a model from a GGUF file stays in memory for the next steps of a recipe: unpacking takes longer than
most of them."""
_unpacked: dict[tuple[Any, ...], Any] = {}


def load_dense(
    source: ModelSource,
    *,
    dtype: str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    placement: Mapping[str, Any] | None = None,
) -> Any:
    """The dense model, in evaluation mode, its weights in a floating-point dtype.

    A GGUF file is unpacked, and the marks of its quantization taken off: transformers would refuse to save the model.

    Args:
        source: where from.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.
        device_map: as in `from_pretrained`.
        trust_remote_code: whether code beside the checkpoint may be run.
        placement: `max_memory` and `offload_folder` of `from_pretrained`; with any, even none of them, the model is
            loaded again in any case.
    """
    from ..model.footprint import checkpoint_bytes

    if isinstance(device_map, str) and device_map not in _PLACEMENTS:
        require_device(device_map)
    key = (source.location, source.gguf_file, dtype)
    if placement is None and key in _unpacked and device_map in (None, "cpu"):
        return copy.deepcopy(_unpacked[key])
    model = _from_pretrained(source, dtype, device_map, trust_remote_code, placement or {})
    if source.gguf_file is not None:
        _forget_gguf(model)
    # What reports call it. The location may be a cache folder of this machine, which means nothing elsewhere.
    model.name_or_path = source.typed
    if placement is not None or source.gguf_file is None:
        return model
    if model.device.type == "cpu" and checkpoint_bytes(model) <= _KEPT_BYTES:
        _unpacked.clear()
        _unpacked[key] = copy.deepcopy(model)
    return model


def _from_pretrained(
    source: ModelSource, dtype: str, device_map: Any, trust_remote_code: bool, placement: Mapping[str, Any]
) -> Any:
    with _named(source):
        return (
            auto_class_of(_config(source, trust_remote_code))
            .from_pretrained(
                source.location,
                dtype=_dtype(dtype),
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                **_gguf_arguments(source),
                **placement,
            )
            .eval()
        )


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer."""
    if source.gguf_file is not None:
        return _tokenizer_in_gguf(source)
    return _tokenizer(source, trust_remote_code=trust_remote_code)


@functools.lru_cache(1)  # it takes seconds
def _tokenizer_in_gguf(source: ModelSource) -> Any:
    return _tokenizer(source, gguf_file=source.gguf_file)


def _tokenizer(source: ModelSource, **arguments: Any) -> Any:
    from ..calibration.tokenizer import TokenizerSource

    with _named(source):
        found = TokenizerSource(source.location, arguments)
        return found.load("save one beside the model (tokenizer.save_pretrained)")


def load_meta_model(source: ModelSource, *, dtype: str = "auto", trust_remote_code: bool = False) -> nn.Module:
    """The same model on the meta device, built from its config alone: shapes and dtypes, no memory."""
    from ..checkpoint.loading import forget_bundled_loader

    with _named(source):
        config = _config(source, trust_remote_code)
    forget_bundled_loader(config)  # which loads weights; here the architecture's own class is wanted
    wanted = _dtype(dtype)
    if wanted == "auto":
        wanted = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model = auto_class_of(config).from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    model.name_or_path = source.typed
    return model.eval()


def _config(source: ModelSource, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    gguf = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    return AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code, **gguf)


@contextlib.contextmanager
def _named(source: ModelSource) -> Iterator[None]:
    """Put the model's name before errors of loading it; transformers' own often speak of the hub alone."""
    folder = Path(source.location)
    parts = ("config.json", "adapter_config.json")
    if source.gguf_file is None and folder.is_dir() and not any((folder / name).is_file() for name in parts):
        raise FileNotFoundError(
            f"cannot load {source.typed}: there is no config.json in this folder; name the one that save_pretrained "
            "wrote, or a hub id"
        )
    try:
        yield
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError  # subclasses want other arguments
        raise kind(f"cannot load {source.typed}: {error}") from error


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


def _gguf_arguments(source: ModelSource) -> dict[str, Any]:
    if source.gguf_file is None:
        return {}
    arguments: dict[str, Any] = {"gguf_file": source.gguf_file}
    try:
        from transformers import GgufConfig
    except ImportError:
        return arguments  # releases without it always unpack
    # Newer releases keep the weights packed where they have kernels for them; factors are made of plain matrices.
    return {**arguments, "quantization_config": GgufConfig(dequantize=True)}


def _forget_gguf(model: Any) -> None:
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.is_quantized = False
