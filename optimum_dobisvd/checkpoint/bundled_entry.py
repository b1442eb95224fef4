"""What `auto_map` in config.json names: the loader for machines without this package (`trust_remote_code=True`).

Never imported by the package itself; `bundle.modeling_source` bundles it with every checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .loading import CompressedLoader

SUPPORTED_FORMAT = 2


@dataclasses.dataclass
class CheckpointConfig(QuantizationConfigMixin):
    """The quantization_config of config.json as it stands; only a few of its keys are read."""

    quant_method: Any = "dobi_svd"

    def __init__(self, **values: Any) -> None:
        self.__dict__.update({"quant_method": "dobi_svd", **values})
        version = values.get("format_version", SUPPORTED_FORMAT)
        if version != SUPPORTED_FORMAT:
            newer = isinstance(version, int) and version > SUPPORTED_FORMAT
            remedy = "pip install -U optimum-dobisvd" if newer else "compress the model again"
            raise ValueError(
                f"config.json says dobi_svd format {version!r}, and the loader beside it reads format "
                f"{SUPPORTED_FORMAT} alone: copy all files from one checkpoint, or {remedy}"
            )


class _Entry:
    """Registers the loader, then hands over to the architecture's own class."""

    auto_class: Any = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Called by some versions of transformers, with what is known here already."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` of that auto class, this time with transformers' own model class."""
        known = AUTO_QUANTIZER_MAPPING.get("dobi_svd")
        # The package's own reads all checkpoints. One of another checkpoint may be older than what this one holds.
        if known is None or known.__name__ == CompressedLoader.__name__:
            AUTO_QUANTIZATION_CONFIG_MAPPING["dobi_svd"] = CheckpointConfig
            AUTO_QUANTIZER_MAPPING["dobi_svd"] = CompressedLoader
        kwargs["trust_remote_code"] = False
        return cls.auto_class.from_pretrained(name, *args, **kwargs)


def __getattr__(name: str) -> Any:
    """`DobiSVDAutoModelForCausalLM` and so on: one entry for every auto class, made when transformers asks for it.

    One for each, because no version of transformers tells an entry reliably which auto class the user called.
    """
    auto_class = getattr(transformers, name.removeprefix("DobiSVD"), None) if name.startswith("DobiSVDAuto") else None
    if auto_class is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (_Entry,), {"auto_class": auto_class, "__module__": __name__})
