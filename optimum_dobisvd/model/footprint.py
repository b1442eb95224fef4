"""What a model weighs and computes: bytes on disk and in memory, multiply-adds per token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .linears import is_conv1d, weight_matrix


def macs_per_token(model: nn.Module) -> int:
    """Return multiply-adds of all linears for one token; of a compressed matrix, those of the linears it became."""
    return sum(map(_macs, model.modules()))


def _macs(module: Any) -> int:
    if is_conv1d(module):
        return weight_matrix(module).numel()
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(inputs, int) or not isinstance(outputs, int) or next(module.children(), None) is not None:
        return 0  # no linear, or a wrapper around some
    return inputs * outputs


def model_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of distinct parameters; tied ones count once, as on disk."""
    return sum(map(tensor_bytes, parameters))


def tensor_bytes(tensor: Any) -> int:
    """Return the bytes of one tensor."""
    return int(tensor.numel() * tensor.element_size())


def checkpoint_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors in a checkpoint, tied ones once. Works on meta tensors, tied or not."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    seen: dict[int, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in tied or tied[name] == name:
            seen[id(tensor)] = tensor_bytes(tensor)
    return sum(seen.values())


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of memory that parameters and buffers hold, shared memory once; offloaded ones hold none.

    bitsandbytes' scales, which hang on its parameters, are counted with them.
    """
    tensors = [found for tensor in (*model.parameters(), *model.buffers()) for found in (tensor, *_hung_on(tensor))]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    # An empty tensor may begin where another one does: the guards of compressed linears do, as safetensors loads them.
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


def _hung_on(holder: Any) -> Iterator[torch.Tensor]:
    """Tensors among the attributes of a parameter, of its `quant_state`, and of the state of a nested one."""
    for key, value in vars(holder).items():
        if isinstance(value, torch.Tensor) and not key.startswith("_"):
            yield value
        elif key in ("quant_state", "state2") and value is not None:
            yield from _hung_on(value)
