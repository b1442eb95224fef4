"""Compression inside `from_pretrained`: of a dense checkpoint, or the quantization of a compressed one."""

from __future__ import annotations

from typing import Any

import torch

from ..calibration.dataset import CalibrationWindows
from ..calibration.tokenizer import TokenizerSource
from ..checkpoint.convert import convert
from ..checkpoint.hf_quantizer import DobiSVDHfQuantizer
from ..config import DobiSVDConfig
from ..pipeline.windows import check_windows, quantization_windows, with_seqlen
from ..quantizer import DobiSVDQuantizer


class CompressOnLoadQuantizer(DobiSVDHfQuantizer):
    """What `from_pretrained` calls for `quant_method: dobi_svd`.

    A dense checkpoint with a `DobiSVDConfig` is checked while still on meta, loaded, then calibrated and compressed. A
    compressed one is loaded, and quantized then if its config has got a `quantization` that it was saved without.
    """

    converts_at_load = True

    def __init__(self, quantization_config: DobiSVDConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._config = quantization_config
        self._windows: CalibrationWindows | None = None
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
        # transformers builds models under torch.device("meta"), and calibration text is real.
        with torch.device("cpu"):
            tokenizer = self._config.tokenizer
            if tokenizer is None:
                tokenizer = TokenizerSource.beside(model, checkpoint_files)
            if not self.pre_quantized:
                _is_dense_yet(model)
                self._quantizer = DobiSVDQuantizer(self._config)
                self._job = self._quantizer.prepare(model, tokenizer)
            elif self.is_to_be_converted:
                self.encoding.require()
                config = with_seqlen(self._config, model)
                self._windows = quantization_windows(self.encoding, None, config, tokenizer)
                if self._windows is not None:
                    check_windows(model, self._windows)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            _is_dense_yet(model)
            # On an error the model is never handed out, so nothing has to be kept for a way back.
            return self._quantizer.run(model, self._job, undo_on_error=False)
        converts = self.is_to_be_converted
        model = super()._process_model_after_weight_loading(model, **kwargs)
        if not converts:
            return model
        asked = self._config
        return convert(
            model,
            asked.quantization,
            windows=self._windows,
            rounding=asked.rounding,
            rounding_settings=asked.rounding_settings,
        )


def _is_dense_yet(model: Any) -> None:
    """Take off the mark of a quantized model, which transformers has put on already: some code goes by it.

    (Jamba calls a linear whose weight it reads in the dense model.)
    """
    for module in model.modules():
        vars(getattr(module, "config", model.config)).pop("_is_quantized", None)
