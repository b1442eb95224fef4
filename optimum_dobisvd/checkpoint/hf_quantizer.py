"""The transformers quantizer of compressed checkpoints: load, save, dequantize. It knows no compressor."""

from __future__ import annotations

from typing import Any

import torch

from ..config import DobiSVDConfig
from ..inference.optimize import restore_after_inference
from .loading import CompressedLoader
from .saving import DOCUMENTS, with_safe_save, without_safe_save


class DobiSVDHfQuantizer(CompressedLoader):
    """`CompressedLoader`, which also saves, and has the model know what it is."""

    def __init__(self, quantization_config: DobiSVDConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.state_dict_to_save: dict[str, torch.Tensor] | None = None
        if self.pre_quantized and not quantization_config.is_compressed:
            raise ValueError("config.json says dobi_svd but lists no compressed modules: it is damaged or was edited")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        attach(model, self.quantization_config, self)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        restore_after_inference(model)
        dense = super()._dequantize(model, dtype=dtype)
        without_safe_save(model)
        return dense

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        # transformers forgets the `state_dict` argument of `save_pretrained` and takes what comes from here.
        return self.state_dict_to_save, {}

    def is_serializable(self) -> bool:
        return True


def attach(model: Any, config: Any, quantizer: DobiSVDHfQuantizer | None = None) -> None:
    """Make a compressed model one that transformers treats as such: its config, its quantizer, its safe save."""
    model.hf_quantizer = quantizer or DobiSVDHfQuantizer(config, pre_quantized=True)
    # transformers and PEFT look here for what a quantized model allows: no cast of its linears, no merging into GPTQ.
    methods = [encoding.quant_method for encoding in model.hf_quantizer.encodings.values()]
    foreign = [method for method in methods if method != config.quant_method]
    model.quantization_method = foreign[0] if foreign else config.quant_method
    model.is_quantized = True
    model.config.quantization_config = config
    model.config._is_quantized = True
    with_safe_save(model)


def forget_compression(model: Any) -> None:
    """Drop plan and report of a compression in this process, which do not describe the model any more."""
    for name in DOCUMENTS:
        model.__dict__.pop(name, None)
    model.dobisvd_is_new = True
