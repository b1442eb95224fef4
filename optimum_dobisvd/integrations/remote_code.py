"""Loader bundled with every checkpoint, for machines without this package (`trust_remote_code=True`).

Everything below the marker is copied, behind the source of `LowRankLinear`, into `modeling_dobisvd.py`.
"""

from __future__ import annotations

from ..nn.low_rank_linear import LowRankLinear

# --- bundled from here ---
import dataclasses
import re
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

SUPPORTED_FORMAT = 1


@dataclasses.dataclass
class CheckpointConfig(QuantizationConfigMixin):
    """The quantization_config of config.json as it stands; only `modules` and `format_version` are read."""

    quant_method: Any = "dobi_svd"

    def __init__(self, **values: Any) -> None:
        self.__dict__.update({"quant_method": "dobi_svd", **values})
        if values.get("format_version", 1) > SUPPORTED_FORMAT:
            raise ValueError(
                f"this checkpoint's dobi_svd format {values['format_version']} is newer than the loader beside it reads; "
                "pip install -U optimum-dobisvd"
            )


class CheckpointQuantizer(HfQuantizer):
    """Builds the low-rank modules from the ranks in config.json; loads, saves nothing."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        prefix = f"{model.base_model_prefix}."
        present = dict(model.named_modules())
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        for listed, entry in self.quantization_config.modules.items():
            name = next(n for n in (listed, listed.removeprefix(prefix), prefix + listed) if n in present)
            dense = present[name]
            conv1d = type(dense).__name__ == "Conv1D"
            rows, columns = dense.weight.shape[::-1] if conv1d else dense.weight.shape
            layer = LowRankLinear(
                columns, rows, entry["rank"], bias=dense.bias is not None, conv1d=conv1d, device="meta", dtype=dense.weight.dtype
            )
            model.set_submodule(name, layer)
            ignored |= {re.escape(f"{n}.weight") + "$" for n in (name, listed)}
        model._keys_to_ignore_on_load_unexpected = ignored
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class DobiSVDModel:
    """What `auto_map` names: registers the loader, then hands over to the architecture's own class."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        cls.auto_class = auto_class

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` of the auto class that was asked, this time with its own model class."""
        if "dobi_svd" not in AUTO_QUANTIZER_MAPPING:
            register_quantization_config("dobi_svd")(CheckpointConfig)
            register_quantizer("dobi_svd")(CheckpointQuantizer)
        kwargs["trust_remote_code"] = False
        return cls.auto_class.from_pretrained(name, *args, **kwargs)
