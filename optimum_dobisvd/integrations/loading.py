"""The half of the quantizer that loads compressed checkpoints.

This module, `checkpoint`, `gptq_linear`, `bnb_linear`, `inner`, `nn`, `kernels`, `storage.eight_bit` and
`storage.inner_forms` are also bundled with every checkpoint (see `saving.modeling_source`), so they import nothing but
torch, transformers and each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.base import HfQuantizer

from ..inner import as_applied, inner_config
from ..nn.compressed_linear import CompressedLinear
from ..nn.dense_linear import empty_compressed, is_dense_linear, to_dense
from ..nn.eight_bit_linear import EightBitLinear
from ..storage.inner_forms import gptq_bits_of, inner_form_named
from .bnb_linear import bnb_quantizer, empty_bnb_children, is_bnb_form, mark_loaded, require_bitsandbytes, unmark
from .checkpoint import check_factors, module_names_in
from .gptq_linear import GPTQTensors, gptq_kernel, quiet_gptqmodel, require_gptqmodel

BUNDLED_ENTRY = "DobiSVD"
"""What the classes in the bundled file are called that `auto_map` names, followed by the auto class."""


def forget_bundled_loader(model: Any) -> None:
    """Take the bundled loader out of `auto_map`: a dense model is saved without it."""
    auto_map = getattr(model.config, "auto_map", None) or {}
    kept = {key: value for key, value in auto_map.items() if f".{BUNDLED_ENTRY}Auto" not in str(value)}
    if kept:
        model.config.auto_map = kept
    elif auto_map:
        del model.config.auto_map


def adapted_modules(model: Any) -> list[str]:
    """The names of the modules that PEFT has wrapped."""
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") or hasattr(module, "original_module")
    ]


class LowRankLoader(HfQuantizer):
    """Builds the modules on meta from the ranks in config.json, and checks the files' headers before reading.

    What another library has quantized, that library's own reader loads: for bitsandbytes this hands on to the
    quantizer that transformers has for it.
    """

    stacks_inner = False
    """Whether this loader quantizes what was saved without; the one bundled with checkpoints cannot."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.inner: Any = inner_config(getattr(quantization_config, "inner", None))
        modules = (getattr(quantization_config, "modules", None) or {}) if self.pre_quantized else {}
        forms = {entry["storage"] for entry in modules.values() if inner_form_named(entry["storage"]) is not None}
        self._has_gptq = any(gptq_bits_of(name) is not None for name in forms)
        self._has_bnb = any(is_bnb_form(name) for name in forms)
        if forms and (self.inner is None or isinstance(self.inner, BitsAndBytesConfig) == self._has_gptq):
            raise ValueError(
                f"config.json lists matrices in the form {sorted(forms)[0]}, and its 'inner' does not say how they "
                "were quantized: copy config.json again"
            )
        self._bnb: Any = bnb_quantizer(self.inner) if self._has_bnb else None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self._has_gptq:
            require_gptqmodel()
            _refuse_offloading(kwargs.get("device_map"))
        if self._has_bnb:
            require_bitsandbytes()
            self._bnb.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        return device_map if self._bnb is None else self._bnb.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        return max_memory if self._bnb is None else self._bnb.adjust_max_memory(max_memory)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if self._bnb is not None:
            return self._bnb.param_element_size(model, param_name, param)
        return super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        # Asked while loading, too: packed weights need not have the shape of their parameters on meta.
        return self._bnb is not None and bool(self._bnb.param_needs_quantization(model, param_name, **kwargs))

    def get_weight_conversions(self) -> list:
        return super().get_weight_conversions() if self._bnb is None else self._bnb.get_weight_conversions()

    def update_weight_conversions(self, weight_conversions: list, *model: Any) -> list:
        # transformers 5.8 to 5.17 call it without the model, 5.23 with; 5.0 to 5.4 ask get_weight_conversions alone.
        if self._bnb is not None:
            return self._bnb.update_weight_conversions(weight_conversions, *model)
        return super().update_weight_conversions(weight_conversions, *model)

    @property
    def _is_to_be_stacked(self) -> bool:
        """Whether the linears are to be quantized once they are loaded."""
        return self.inner is not None and not (self._has_gptq or self._has_bnb)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if self._is_to_be_stacked and not self.stacks_inner:
            raise ValueError(
                "the quantization config asks for inner quantization of a checkpoint that was saved without, which "
                "needs the package: pip install optimum-dobisvd"
            )
        modules = self.quantization_config.modules  # type: ignore[attr-defined]
        names = module_names_in(model, list(modules))
        for listed, name in names.items():
            dense = model.get_submodule(name)
            if not is_dense_linear(dense):
                raise ValueError(
                    f"config.json lists {listed} as compressed, and in {type(model).__name__} it is a "
                    f"{type(dense).__name__}: the checkpoint belongs to another architecture"
                )
            entry = modules[listed]
            _check_possible(listed, entry, *_matrix_shape(dense))
            shell = empty_compressed(dense, entry["storage"], entry["rank"], device="meta")
            self._empty_children(shell)
            model.set_submodule(name, shell)
        if checkpoint_files:
            check_factors(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, EightBitLinear):
                module.freeze()
                _offloaded_as_stored(name, module)
            for child, tensors in module.named_children():
                if isinstance(tensors, GPTQTensors):
                    setattr(module, child, self._kernel(tensors))
        if self._bnb is not None:
            mark_loaded(model, self.inner)
            # Private, and needed to save the model again: transformers would undo the conversions of loading, and
            # those of bitsandbytes have no inverse (their linears write their tensors by themselves).
            conversions = getattr(model, "_weight_conversions", None) or []
            model._weight_conversions = [
                each
                for each in conversions
                if not any(hasattr(operation, "hf_quantizer") for operation in getattr(each, "operations", ()))
            ]
        if self._has_gptq:
            self.quantization_config.inner = as_applied(self.inner)  # type: ignore[attr-defined]
        return model

    def _empty_children(self, shell: CompressedLinear) -> None:
        """Places for quantized weights in a shell's children, on meta."""
        if is_bnb_form(shell.storage):
            empty_bnb_children(shell, self.inner)
        gptq = gptq_bits_of(shell.storage)
        if gptq is not None:
            for child, linear in list(shell.named_children()):
                shape = (linear.in_features, linear.out_features, linear.bias is not None)
                setattr(shell, child, GPTQTensors(*shape, *gptq, device="meta"))  # type: ignore[arg-type]

    def _kernel(self, tensors: GPTQTensors) -> nn.Module:
        with quiet_gptqmodel():
            return gptq_kernel(
                tensors.tensors(),
                in_features=tensors.in_features,
                out_features=tensors.out_features,
                bits=tensors.bits,
                group_size=tensors.group_size,
                options=self.inner.to_dict(),
            )

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        low_rank = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
        for name, module in low_rank.items():
            if adapted_modules(module):
                raise ValueError(
                    f"{name} has adapters (PEFT), which would be lost: merge them (merge_and_unload) or take them off "
                    "(unload), then dequantize"
                )
            if any(parameter.device.type == "meta" for parameter in module.parameters()):
                raise ValueError(f"{name} is offloaded; load the model without cpu or disk offload to dequantize it")
        for name, module in low_rank.items():
            model.set_submodule(name, to_dense(module))
        unmark(model)
        forget_bundled_loader(model)
        if isinstance(dtype, str):  # config.dtype, which save_pretrained leaves as a name
            dtype = getattr(torch, dtype)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        modules = self.quantization_config.modules or {}  # type: ignore[attr-defined]
        return all(entry["storage"] == "plain" for entry in modules.values())  # quantized factors cannot be trained

    @property
    def is_compileable(self) -> bool:
        return True


def _refuse_offloading(device_map: Any) -> None:
    """ValueError if accelerate would keep some of the model on meta and fetch it for every pass."""
    if isinstance(device_map, dict):
        kinds = {str(place).split(":")[0] for place in device_map.values()}
        if "disk" in kinds or ("cpu" in kinds and len(kinds) > 1):
            raise ValueError(
                "linears quantized by GPTQ cannot be offloaded to disk, or to the CPU beside a GPU: gptqmodel "
                "computes where its tensors are; give a device_map of GPUs, or device_map='cpu'"
            )


def _offloaded_as_stored(name: str, module: EightBitLinear) -> None:
    """Have accelerate read tensors that stay on disk in the dtypes of their parameters.

    transformers before 5.14 has it read all of a model in one float dtype, in which integers lose their low bits.
    """
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    index = getattr(getattr(weights, "dataset", None), "index", {})
    for key, tensor in module.tensors().items():
        on_disk = index.get(f"{name}.{key}", {})
        if "safetensors_file" in on_disk:
            on_disk["dtype"] = str(tensor.dtype).removeprefix("torch.")


def _matrix_shape(dense: Any) -> tuple[int, int]:
    rows, columns = dense.weight.shape
    return (rows, columns) if type(dense) is nn.Linear else (columns, rows)


def _check_possible(name: str, entry: dict[str, Any], out_features: int, in_features: int) -> None:
    """ValueError if no such matrix can have that rank in that storage."""
    rank, form = entry["rank"], inner_form_named(entry["storage"])
    if rank is not None and rank > min(out_features, in_features):
        raise ValueError(
            f"{name}: rank {rank} in config.json is above its largest possible rank {min(out_features, in_features)}"
        )
    obstacle = None if form is None else form.obstacle(out_features, in_features, rank)
    if obstacle is not None:
        raise ValueError(f"{name}: config.json cannot be right, {obstacle}; copy it again")
