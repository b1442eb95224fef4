"""The transformers quantizer: compress on load, load compressed, save, dequantize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..calibration.dataset import CalibrationWindows
from ..config import DobiSVDConfig
from ..inner import InnerConfig, as_applied
from .loading import LowRankLoader
from .saving import with_safe_save, without_safe_save


class DobiSVDHfQuantizer(LowRankLoader):
    """What `from_pretrained` calls for `quant_method: dobi_svd`.

    A dense checkpoint with a `DobiSVDConfig` is checked while still on meta, loaded, then calibrated and compressed; a
    compressed checkpoint is loaded by `LowRankLoader`.
    """

    stacks_inner = True

    def __init__(self, quantization_config: DobiSVDConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._config = quantization_config
        self._windows: CalibrationWindows | None = None
        self.state_dict_to_save: dict[str, torch.Tensor] | None = None
        if self.pre_quantized and not quantization_config.is_compressed:
            raise ValueError("config.json says dobi_svd but lists no compressed modules: it is damaged or was edited")
        if not self.pre_quantized and quantization_config.is_compressed:
            raise ValueError(
                "this DobiSVDConfig describes a compressed model (it has `modules`) and the checkpoint is dense; "
                "pass a fresh DobiSVDConfig(method=..., ratio=..., dataset=...)"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.pre_quantized:
            model = super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
            if self._is_to_be_stacked:
                with torch.device("cpu"):
                    self._windows = self._windows_to_stack_with(model)
            return model
        from ..quantizer import DobiSVDQuantizer  # calibration is not imported by those who only load

        self._compressor = DobiSVDQuantizer(self._config)
        with torch.device(
            "cpu"
        ):  # transformers builds models under torch.device("meta"), and calibration text is real
            self._windows = self._compressor.prepare(model)[2]
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            attach(model, self._config)
            model = super()._process_model_after_weight_loading(model, **kwargs)
            return stack_inner(model, self.inner, self._windows) if self._is_to_be_stacked else model
        # On an error the model is never handed out, so nothing has to be kept for a way back.
        self._compressor.quantize_model(model, windows=self._windows, undo_on_error=False)
        return model

    def _windows_to_stack_with(self, model: Any) -> CalibrationWindows | None:
        """Refuses what cannot work while no weight has been read, and draws what GPTQ is calibrated on."""
        from ..stacking import inner_windows, require_backend

        require_backend(self.inner)
        config, tokenizer = self._config, getattr(model, "name_or_path", None)
        draw = {"nsamples": config.nsamples, "seqlen": config.seqlen, "seed": config.seed}
        return inner_windows(self.inner, None, config.dataset, tokenizer, **draw)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dense = super()._dequantize(model, dtype=dtype)
        without_safe_save(model)
        return dense

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        # transformers forgets the `state_dict` argument of `save_pretrained` and takes what comes from here.
        return self.state_dict_to_save, {}

    def is_serializable(self) -> bool:
        return True


def stack_inner(model: Any, inner: InnerConfig, windows: CalibrationWindows | None) -> Any:
    """Quantize a loaded low-rank model whose linears are not quantized yet; its config says so afterwards.

    Args:
        model: as it was loaded.
        inner: a `GPTQConfig` or a `BitsAndBytesConfig`.
        windows: calibration windows for GPTQ.
    """
    from ..calibration.layout import find_blocks
    from ..stacking import mark_for_inner, quantize_shells

    config = model.config.quantization_config
    blocks = find_blocks(model)
    with torch.inference_mode(False), torch.no_grad():
        modules = mark_for_inner(model, inner, config)
        quantize_shells(model, blocks, inner, windows, batch_size=config.batch_size)
    attach(model, replace(config, modules=modules, inner=as_applied(inner)))
    _forget_compression(model)
    return model


def store_as(model: Any, storage: str) -> Any:
    """Store the factors of a loaded model as `plain`, `remap` or `int8`; its config says so afterwards.

    Linears in 8 bits are neither trained nor take an adapter: `plain` first, train, and back. With `int8` whole
    matrices are in 8 bits, too; otherwise they are dense.
    """
    from ..change_storage import change_storage

    config = model.config.quantization_config
    with torch.inference_mode(False), torch.no_grad():
        modules = change_storage(model, storage, config)
    dense_storage = "dense_int8" if storage == "int8" else None
    attach(model, replace(config, modules=modules, storage=storage, dense_storage=dense_storage))
    _forget_compression(model)
    return model


def _forget_compression(model: Any) -> None:
    """Plan and report of a compression in this process, which do not describe the model any more."""
    for name in ("dobisvd_plan", "dobisvd_report", "dobisvd_training"):
        model.__dict__.pop(name, None)
    model.dobisvd_is_new = True


def attach(model: Any, config: DobiSVDConfig) -> None:
    """Make a compressed model one that transformers treats as such: its config, its quantizer, its safe save."""
    model.hf_quantizer = DobiSVDHfQuantizer(config, pre_quantized=True)
    # transformers and PEFT look here for what a quantized model allows: no cast of its linears, no merging into GPTQ.
    model.quantization_method = config.inner.quant_method if config.inner_is_applied else config.quant_method
    model.is_quantized = True
    model.config.quantization_config = config
    model.config._is_quantized = True
    with_safe_save(model)
