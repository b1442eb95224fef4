"""What a set of statistics belongs to: these weights, these tokens."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from ..calibration.dataset import CalibrationWindows


def fingerprint(model: nn.Module, windows: CalibrationWindows) -> dict[str, Any]:
    """`weights` and `tokens` are sha256 and decide; the rest says in words where a difference comes from."""
    return {
        "model_class": type(model).__name__,
        "dtype": str(next(p.dtype for p in model.parameters() if p.is_floating_point())),
        "weights": weights_sha256(model),
        "tokens": windows.sha256(),
        **windows.description,
    }


def weights_sha256(model: nn.Module) -> str:
    """sha256 over all parameters in order of name, offloaded ones included."""
    digest = hashlib.sha256()
    for name, module in sorted(model.named_modules()):
        if not module._parameters:
            continue
        with align_module_device(module, execution_device="cpu"):
            for key, parameter in sorted(module._parameters.items()):
                if parameter is None:
                    continue
                digest.update(f"{name}.{key} {tuple(parameter.shape)} {parameter.dtype}".encode())
                data = parameter.detach().cpu().contiguous()
                digest.update(data.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def differing_fields(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """`field: stored -> current` for every field that differs, or nothing if weights, dtype and tokens are the same."""
    if all(stored.get(key) == current.get(key) for key in ("weights", "tokens", "dtype")):
        return []
    return [
        f"{key}: {stored.get(key)!r} in the store, {current.get(key)!r} now"
        for key in dict.fromkeys([*stored, *current])
        if stored.get(key) != current.get(key)
    ]
