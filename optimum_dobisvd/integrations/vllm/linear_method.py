"""How vLLM loads and computes a linear, or several that it joins, of which some are compressed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.utils.torch_utils import direct_register_custom_op

from .joined_linear import JoinedLinear
from .member import Member, Parts

_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32}
"""By the names in the heads of safetensors files."""


class CompressedLinearMethod(LinearMethodBase):
    """What computes one layer of vLLM.

    The layer's members, the matrices that vLLM joins in it (`q`, `k` and `v`; `gate` and `up`), may each have another
    structure and encoding. They lie in `layer.compressed`. Under the names that the checkpoint's tensors have in the
    layer there are empty parameters, whose loaders hand each tensor on to its member.

    A bias is vLLM's own parameter, as in any other layer.

    Args:
        entries: of config.json by name of the member, in the order of the outputs; None for one that is as it was.
    """

    def __init__(self, entries: Mapping[str, Mapping[str, Any] | None]) -> None:
        self._entries = dict(entries)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = list(output_partition_sizes)
        whole = _whole_sizes(layer, sizes, output_size)
        if len(self._entries) == 1:  # or one matrix in the checkpoint, too
            sizes, whole = [sum(sizes)], [sum(whole)]
        if len(sizes) != len(self._entries):
            raise ValueError(
                f"{layer.prefix} of vLLM's model has {len(sizes)} parts, and {list(self._entries)} are "
                f"{len(self._entries)}: this architecture is not served, load the checkpoint with transformers instead"
            )
        inputs = (input_size, input_size_per_partition)
        members = [
            Member(name, entry, (all_of_it, inputs[0]), (part, inputs[1]), params_dtype)
            for (name, entry), all_of_it, part in zip(self._entries.items(), whole, sizes, strict=True)
        ]
        parts = Parts(members, inputs, extra_weight_attrs["weight_loader"])
        layer.compressed = JoinedLinear([member.module for member in members])
        layer.compressed_members = members
        layer.compressed_outputs = sum(sizes)
        layer.compressed_is_opaque = not all(member.is_plain for member in members)
        if layer.compressed_is_opaque:
            # Where vLLM keeps what a graph names instead of holding.
            get_current_vllm_config().compilation_config.static_forward_context[layer.prefix] = layer
        self._put_placeholders(layer, members, parts, params_dtype)

    def _put_placeholders(self, layer: Any, members: list[Member], parts: Parts, dtype: torch.dtype) -> None:
        """Give the layer an empty parameter under every name that the checkpoint has in it."""
        _put(layer, "weight", dtype, partial(_load_unless_empty, parts))
        for member in members:
            for key, (_, header) in member.tensors.items():
                if key != "weight":
                    _put(layer, key, _DTYPES.get(str(header), dtype), partial(_load, parts, key))
            if layer.has_bias and "." in member.bias_key:
                _put(layer, member.bias_key, dtype, partial(_load_bias, layer))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make what was loaded fast. ValueError names a tensor that was not in the checkpoint."""
        members = layer.__dict__.pop("compressed_members")
        for member in members:
            member.check_complete()
            for key in (*member.tensors, member.bias_key):
                top, dot, _ = key.partition(".")
                if dot:
                    layer._modules.pop(top, None)
                elif key not in ("weight", "bias"):
                    layer._parameters.pop(key, None)
        layer.compressed.finish(members, layer.params_dtype, _VLLMLinear)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if layer.compressed_is_opaque and torch.compiler.is_compiling():
            y = torch.ops.vllm.optimum_dobisvd_linear(x, layer.compressed_outputs, layer.prefix)
        else:
            y = layer.compressed(x)
        return y if bias is None else y + bias


class _VLLMLinear(nn.Module):
    """A plain linear computed as vLLM computes those that no method is for: with its own kernels."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.data, requires_grad=False)
        self._method = UnquantizedLinearMethod()
        self._method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._method.apply(self, x, None)


def _whole_sizes(layer: Any, sizes: list[int], output_size: int) -> list[int]:
    """Return the outputs of a layer's parts in the checkpoint; `sizes` are those that one process has."""
    # vLLM's output_size counts heads of k and v once for every process that has them.
    processes, replicas = output_size // sum(sizes), getattr(layer, "num_kv_head_replicas", 1)
    return [size * processes // (replicas if index else 1) for index, size in enumerate(sizes)]


def _put(layer: nn.Module, key: str, dtype: torch.dtype, loader: Any) -> None:
    *path, name = key.split(".")
    owner = layer
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    owner.register_parameter(name, parameter)


def _load(parts: Parts, key: str, parameter: Tensor, loaded: Tensor, shard_id: Any = None) -> None:
    parts.load(key, loaded, shard_id)


def _load_unless_empty(parts: Parts, parameter: Tensor, loaded: Tensor, shard_id: Any = None) -> None:
    # Under a compressed matrix's old name the checkpoint has nothing, for readers that do not know the format.
    if loaded.numel():
        parts.load("weight", loaded, shard_id)


def _load_bias(layer: Any, parameter: Tensor, loaded: Tensor, *shard_id: Any) -> None:
    layer.bias.weight_loader(layer.bias, loaded, *(each for each in shard_id if each is not None))


def _compute(x: Tensor, outputs: int, name: str) -> Tensor:
    """Compute a layer by its name: what a graph calls where kernels are chosen by the number of rows when it runs."""
    y: Tensor = get_forward_context().no_compile_layers[name].compressed(x)
    return y


def _like_computed(x: Tensor, outputs: int, name: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


direct_register_custom_op("optimum_dobisvd_linear", op_func=_compute, fake_impl=_like_computed)
