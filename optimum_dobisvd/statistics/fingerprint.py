"""A fingerprint of what statistics were collected on: weights, the model's configuration, tokens."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from ..calibration.dataset import CalibrationWindows

_DECISIVE = ("weights", "tokens", "dtype")

# Fields of a model's configuration that its forward pass over given tokens does not read.
_UNREAD_CONFIG = {
    *("architectures", "dtype", "torch_dtype", "use_cache", "transformers_version", "quantization_config"),
    *("name_or_path", "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id"),
    *("problem_type", "tokenizer_class", "task_specific_params", "bos_token_id", "eos_token_id", "pad_token_id"),
}


def fingerprint(model: nn.Module, windows: CalibrationWindows) -> dict[str, Any]:
    """Return JSON values that identify a model and its calibration windows.

    `weights`, `tokens` (both sha256), `dtype` and `config` decide whether statistics fit (see `differing_fields`); the
    other fields tell a reader where a difference comes from.
    """
    return {
        "model_class": type(model).__name__,
        "dtype": str(next((p.dtype for p in model.parameters() if p.is_floating_point()), None)),
        "weights": weights_sha256(model),
        "tokens": windows.sha256(),
        **windows.description,
        "config": _model_config(model),
    }


def _model_config(model: nn.Module) -> dict[str, Any]:
    """Return the fields of the model's configuration that its activations depend on, as JSON values."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    # One round through JSON, so that what was just computed equals what is read back from a file.
    return _without_unread(json.loads(json.dumps(config.to_dict(), default=str)))


def weights_sha256(model: nn.Module) -> str:
    """Return the sha256 of all parameters and saved buffers in order of name, offloaded ones included."""
    digest = hashlib.sha256()
    for name, module in sorted(model.named_modules()):
        saved = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
        if not module._parameters and not saved:
            continue
        # Only for what is offloaded: of what is on a GPU, Accelerate would make new parameters, and tied ones would no
        # longer be tied.
        away = any(tensor is not None and tensor.is_meta for tensor in (*module._parameters.values(), *saved.values()))
        with align_module_device(module, execution_device="cpu") if away else nullcontext():
            for key, tensor in sorted([*module._parameters.items(), *saved.items()]):
                if tensor is not None:
                    digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def differing_fields(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return a line for every field that differs, with both values; none if all that decides is equal.

    A field of the model's configuration that only one side has is a default of a newer transformers, no difference.
    """
    config = _differing_config(stored.get("config"), current.get("config"), "config")
    if not config and all(stored.get(key) == current.get(key) for key in _DECISIVE):
        return []
    return config + changes({**stored, "config": None}, {**current, "config": None})


def changes(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return a line for every field that differs, with both values."""
    return [
        f"{key}: {stored.get(key)!r} in the store, {current.get(key)!r} now"
        for key in dict.fromkeys([*stored, *current])
        if stored.get(key) != current.get(key)
    ]


def _differing_config(stored: Any, current: Any, name: str) -> list[str]:
    if isinstance(stored, dict) and isinstance(current, dict):
        common = [key for key in stored if key in current]
        return [line for key in common for line in _differing_config(stored[key], current[key], f"{name}.{key}")]
    return [] if stored == current else [f"{name}: {stored!r} in the store, {current!r} now"]


def _without_unread(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_unread(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _UNREAD_CONFIG and not key.startswith("_")
    }
