"""The half of the quantizer that loads compressed checkpoints.

This module, `checkpoint`, `nn`, `kernels` and `storage.eight_bit` are also bundled with every checkpoint (see
`saving.modeling_source`), so they import nothing but torch, transformers and each other.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from ..nn.compressed_linear import CompressedLinear
from ..nn.dense_linear import empty_compressed, is_dense_linear, to_dense
from ..nn.eight_bit_linear import EightBitLinear
from .checkpoint import check_factors, module_names_in

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
    """Builds the modules on meta from the ranks in config.json, and checks the files' headers before reading."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        modules = self.quantization_config.modules  # type: ignore[attr-defined]
        names = module_names_in(model, list(modules))
        for listed, name in names.items():
            dense = model.get_submodule(name)
            if not is_dense_linear(dense):
                raise ValueError(
                    f"config.json lists {listed} as compressed, and in {type(model).__name__} it is a "
                    f"{type(dense).__name__}: the checkpoint belongs to another architecture"
                )
            rank, limit = modules[listed]["rank"], min(dense.weight.shape)
            if rank is not None and rank > limit:
                raise ValueError(f"{listed}: rank {rank} in config.json is above its largest possible rank {limit}")
            model.set_submodule(name, empty_compressed(dense, modules[listed]["storage"], rank, device="meta"))
        if checkpoint_files:
            check_factors(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, EightBitLinear):
                module.freeze()
        return model

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
        return all(entry["storage"] == "plain" for entry in modules.values())  # 8-bit factors cannot be trained

    @property
    def is_compileable(self) -> bool:
        return True
