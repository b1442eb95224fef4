"""The transformers quantizer: compress on load, load compressed, save, dequantize."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from ..config import DobiSVDConfig
from ..nn.dense_linear import empty_low_rank, is_dense_linear, to_dense
from ..nn.low_rank_linear import LowRankLinear
from .checkpoint import check_factors, module_names_in
from .saving import tripwire_tensors, with_safe_save


class DobiSVDHfQuantizer(HfQuantizer):
    """What `from_pretrained` calls for `quant_method: dobi_svd`.

    Dense checkpoint + `DobiSVDConfig`: the model is checked while still on meta, loaded, then calibrated and compressed.
    Compressed checkpoint: the modules are built on meta from the ranks in config.json and the files' headers are checked
    against them before a byte is read.
    """

    # transformers refuses dense checkpoints if this is True, and it is never needed for compressed ones.
    requires_calibration = False

    def __init__(self, quantization_config: DobiSVDConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checkpoint_files: list[str] | None = None
        self._tensor_names: dict[str, str] = {}
        if self.pre_quantized and not quantization_config.is_compressed:
            raise ValueError("config.json says dobi_svd but lists no compressed modules: it is damaged, or of a dense model")
        if not self.pre_quantized and quantization_config.is_compressed:
            raise ValueError(
                "this DobiSVDConfig describes an already compressed model (it has `modules`) and the checkpoint is dense; "
                "pass a fresh DobiSVDConfig(method=..., ratio=..., dataset=...)"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any):
        if not self.pre_quantized:
            from ..quantizer import check_model

            check_model(model, self.quantization_config)
            return model
        self._checkpoint_files = checkpoint_files
        modules = self.quantization_config.modules
        names = module_names_in(model, list(modules))
        for name, entry in modules.items():
            found = names[name]
            dense = model.get_submodule(found)
            if not is_dense_linear(dense):
                raise ValueError(f"{found} is a {type(dense).__name__} in this model and a compressed linear in config.json")
            model.set_submodule(found, empty_low_rank(dense, entry["rank"], device="meta"))
        # The zero-size tensors under the dense names stop readers that do not know this format; this one does.
        ignored = {re.escape(f"{name}.weight") + "$" for pair in names.items() for name in pair}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored
        return model

    def update_weight_conversions(self, weight_conversions, model):
        # The first call that knows model, files and renamings; nothing has been allocated yet.
        if self.pre_quantized and self._checkpoint_files:
            check_factors(model, self._checkpoint_files, weight_conversions)
            self._checkpoint_files = None
        return super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any):
        if not self.pre_quantized:
            from ..quantizer import DobiSVDQuantizer

            quantizer = DobiSVDQuantizer(self.quantization_config)
            quantizer.quantize_model(model)
            model.dobisvd_plan, model.dobisvd_report = quantizer.plan, quantizer.report
        attach(model, model.config.quantization_config)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None):
        for name, module in list(model.named_modules()):
            if isinstance(module, LowRankLinear):
                model.set_submodule(name, to_dense(module))
        model.__dict__.pop("save_pretrained", None)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module):
        return {**model.state_dict(), **tripwire_tensors(model)}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: nn.Module, config: DobiSVDConfig) -> None:
    """Make a compressed model one that transformers treats as such: its config, its quantizer, its safe save."""
    quantizer = DobiSVDHfQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = config  # type: ignore[union-attr]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    model.config._is_quantized = True  # type: ignore[union-attr]
    with_safe_save(model)
