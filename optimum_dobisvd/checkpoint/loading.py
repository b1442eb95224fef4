"""The half of the quantizer that loads compressed checkpoints. Bundled with every checkpoint (see `bundle`)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from ..encodings.base import Encoding
from ..encodings.registry import encoding_named, encoding_of, rounded
from ..model.experts import align, fuse, linearize, linearized_experts
from ..model.linears import is_linear, weight_matrix
from ..structures.base import CompressedLinear, compressed_linears, to_dense
from ..structures.format import Format
from ..structures.registry import STRUCTURES
from .tensor_parallel import update_plan
from .verify import applicable, check_tensors, lacks_modules, module_names_in, with_all_conversions

BUNDLED_ENTRY = "DobiSVD"
"""What the classes in the bundled file are called that `auto_map` names, followed by the auto class."""


OWN_CODE = "Dense"
"""Put before the auto class in `auto_map`: the model's own code, where the architecture is none of transformers'."""


def forget_bundled_loader(config: Any) -> None:
    """Take the bundled loader out of a configuration's `auto_map`: a dense model is saved without it."""
    auto_map = getattr(config, "auto_map", None) or {}
    kept = {
        key.removeprefix(OWN_CODE): value
        for key, value in auto_map.items()
        if f".{BUNDLED_ENTRY}Auto" not in str(value)
    }
    if kept:
        config.auto_map = kept
    elif auto_map:
        del config.auto_map


def adapted_modules(model: Any) -> list[str]:
    """Return the names of the modules that PEFT has wrapped."""
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") or hasattr(module, "original_module")
    ]


class CompressedLoader(HfQuantizer):
    """Builds the modules on meta from `modules` of config.json, and checks the files' headers before reading.

    What another library has quantized, that library's own reader loads: where an encoding names a quantizer of
    transformers, this hands on to it.
    """

    converts_at_load = False
    """Whether this loader quantizes what was saved without; the one bundled with checkpoints cannot."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        setting = getattr(quantization_config, "quantization", None)
        rounding = getattr(quantization_config, "rounding", None)
        how = getattr(quantization_config, "rounding_settings", None) or {}
        self.encoding = rounded(encoding_of(setting, strict=False), rounding, how)
        entries = ((getattr(quantization_config, "modules", None) or {}) if self.pre_quantized else {}).values()
        # Only the one whose settings are given can be made with them.
        kinds = self._kinds = {self.encoding.name, *self.encoding.alternatives}
        self.encodings: dict[str, Encoding] = {}
        for entry in entries:
            name = entry["encoding"]
            self.encodings[name] = encoding_named(name, self.encoding.settings if name in kinds else None)
            if name not in kinds and self.encodings[name].quant_method != quantization_config.quant_method:
                raise ValueError(
                    f"config.json lists matrices in encoding {name}, and its 'quantization' does not say how they "
                    "were quantized: copy config.json again"
                )
        readers = (encoding.hf_quantizer() for encoding in self.encodings.values())
        self._reader: Any = next((reader for reader in readers if reader is not None), None)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        for encoding in self.encodings.values():
            encoding.require()
            encoding.check_device_map(kwargs.get("device_map"))
        if self._reader is not None:
            self._reader.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        return device_map if self._reader is None else self._reader.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        return max_memory if self._reader is None else self._reader.adjust_max_memory(max_memory)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if self._reader is not None:
            return self._reader.param_element_size(model, param_name, param)
        return super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        # Asked while loading, too: packed weights need not have the shape of their parameters on meta.
        return self._reader is not None and bool(self._reader.param_needs_quantization(model, param_name, **kwargs))

    def get_weight_conversions(self) -> list:
        return super().get_weight_conversions() if self._reader is None else self._reader.get_weight_conversions()

    def update_weight_conversions(self, weight_conversions: list, *model: Any) -> list:
        # transformers 5.8 to 5.17 call it without the model, 5.23 with; 5.0 to 5.4 ask get_weight_conversions alone.
        kept = applicable(weight_conversions, *model) if model else weight_conversions
        if self._reader is not None:
            return self._reader.update_weight_conversions(kept, *model)
        return super().update_weight_conversions(kept, *model)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        # Called for the plan of expert parallelism, too, which has nothing for single linears.
        super().update_parallel_plan(model, plan)
        if plan is model.tp_plan:
            update_plan(model, plan)

    @property
    def is_to_be_converted(self) -> bool:
        """Whether the linears are to be quantized once they are loaded."""
        return not self.encoding.trainable and not self._kinds & self.encodings.keys()

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.is_to_be_converted and not self.converts_at_load:
            raise ValueError(
                "the quantization config asks for the quantization of a checkpoint that was saved without, which "
                "needs the package: pip install optimum-dobisvd"
            )
        modules = self.quantization_config.modules  # type: ignore[attr-defined]
        if lacks_modules(model, list(modules)):  # experts, of which each matrix is one of its own
            for name, experts in linearize(model).items():
                experts.release()
                # What holds them: transformers would draw weights for the stacked ones, which are gone.
                model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        names = module_names_in(model, list(modules))
        for listed, name in names.items():
            dense = model.get_submodule(name)
            if not is_linear(dense):  # subclasses that compute the same are compressed, too
                raise ValueError(
                    f"config.json lists {listed} as compressed, and in {type(model).__name__} it is a "
                    f"{type(dense).__name__}: the checkpoint belongs to another architecture"
                )
            entry = modules[listed]
            format = Format(STRUCTURES.get(entry["structure"]), self.encodings[entry["encoding"]])
            model.set_submodule(name, empty_compressed(listed, dense, format, entry.get("rank")))
        if checkpoint_files:
            check_tensors(model, checkpoint_files, self.encodings)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for encoding in self.encodings.values():
                stack.enter_context(encoding.quiet())
            for name, module in compressed_linears(model).items():
                for child, linear in list(module.named_children()):
                    loaded = self.encodings[module.encoding].loaded(f"{name}.{child}", linear)
                    if loaded is not linear:
                        module.set_submodule(child, loaded)
        for encoding in self.encodings.values():
            encoding.loaded_model(model)
        align(model)
        if self._kinds & self.encodings.keys():
            self.quantization_config.quantization = self.encoding.as_applied()  # type: ignore[attr-defined]
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        compressed = compressed_linears(model)
        for name, module in compressed.items():
            if adapted_modules(module):
                raise ValueError(
                    f"{name} has adapters (PEFT), which would be lost: merge them (merge_and_unload) or take them off "
                    "(unload), then dequantize"
                )
            if any(parameter.device.type == "meta" for parameter in module.parameters()):
                raise ValueError(f"{name} is offloaded; load the model without cpu or disk offload to dequantize it")
        for name, module in compressed.items():
            model.set_submodule(name, to_dense(module))
        if linearized_experts(model):
            fuse(model)
            with_all_conversions(model)
        for encoding in self.encodings.values():
            encoding.forget(model)
        model.__dict__.pop("quantization_method", None)
        forget_bundled_loader(model.config)
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
        return all(encoding.trainable for encoding in self.encodings.values())

    @property
    def is_compileable(self) -> bool:
        return True


def empty_compressed(name: str, dense: Any, format: Format, rank: int | None) -> CompressedLinear:
    """Return a compressed linear on meta in the place of a dense one. ValueError if it cannot have that rank so."""
    out_features, in_features = weight_matrix(dense).shape
    if rank is not None and rank > min(out_features, in_features):
        raise ValueError(
            f"{name}: rank {rank} in config.json is above its largest possible rank {min(out_features, in_features)}"
        )
    reason = format.unsupported_reason(out_features, in_features, rank)
    if reason is not None:
        raise ValueError(f"{name}: config.json cannot be right, {reason}; copy it again")
    return format.empty(dense, rank)
