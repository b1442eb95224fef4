"""Weights under Accelerate: read them wherever they are, put compressed ones where the weight was."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, attach_align_device_hook
from accelerate.utils import align_module_device
from torch import Tensor, nn

from .compressed_linear import CompressedLinear
from .dense_linear import empty_compressed, weight_matrix


def dense_weight(module: Any) -> Tensor:
    """A dense linear's weight, `m x n`, brought back from cpu or disk offload if need be."""
    if module.weight.device.type != "meta":
        return weight_matrix(module)
    with align_module_device(module, execution_device="cpu"):
        return weight_matrix(module).clone()


def dense_bias(module: Any) -> Tensor | None:
    """A dense linear's bias in float64, if it has one; while it runs, Accelerate may have taken it away again."""
    if not isinstance(module.bias, Tensor):
        return None
    if module.bias.device.type != "meta":
        return module.bias.detach().double()
    with align_module_device(module, execution_device="cpu"):
        return module.bias.detach().double()


def replace_with(
    model: nn.Module, name: str, storage: str, rank: int | None, tensors: Mapping[str, Tensor]
) -> CompressedLinear:
    """Put a compressed linear in the place of the linear `name`, on its device, in its dtype, offloaded if it was.

    Args:
        model: where the linear is.
        name: of the linear.
        storage: of the tensors.
        rank: None for a whole matrix.
        tensors: what the storage packed.
    """
    module: Any = model.get_submodule(name)
    hook = _align_hook(module)
    with align_module_device(module, execution_device="cpu") if hook is not None and hook.offload else nullcontext():
        device = module.weight.device
        new = empty_compressed(module, storage, rank, device="meta")
        new.weight = torch.empty(0, device=device, dtype=module.weight.dtype)
        for key, value in tensors.items():
            _set(new, key, value, module.weight)
        if module.bias is not None:
            _set(new, new.bias_key, module.bias, module.bias)
    new.train(module.training)
    if hook is not None:
        if hook.offload:
            values = {key: value.to("cpu") for key, value in new.state_dict().items()}
            attach_align_device_hook(new, execution_device=hook.execution_device, offload=True, weights_map=values)
        else:
            add_hook_to_module(
                new, AlignDevicesHook(execution_device=hook.execution_device, io_same_device=hook.io_same_device)
            )
    model.set_submodule(name, new)
    return new


def _set(module: nn.Module, key: str, value: Tensor, like: Tensor) -> None:
    """A parameter of its own memory, on the device of the one it stands for.

    One that the module trains gets that one's dtype and `requires_grad`, too.
    """
    path, _, last = key.rpartition(".")
    owner = module.get_submodule(path)
    spec = getattr(owner, last)
    data = value.detach().to(device=like.device, dtype=spec.dtype, copy=True).contiguous()
    if data.is_floating_point() and not bool(torch.isfinite(data).all()):
        raise ValueError(
            f"a factor does not fit into {data.dtype}: its values overflow; load the model in bfloat16 or float32"
        )
    setattr(owner, last, nn.Parameter(data, requires_grad=spec.requires_grad and like.requires_grad))


def _align_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((each for each in hooks if isinstance(each, AlignDevicesHook)), None)
