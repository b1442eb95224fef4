"""What `auto_map` in config.json names: the loader for machines without this package (`trust_remote_code=True`).

Never imported by the package itself; `bundle.modeling_source` bundles it with every checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..structures.base import compressed_linears
from .loading import OWN_CODE, CompressedLoader

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
        """`from_pretrained` of that auto class, this time with transformers' own model class, or the repository's."""
        known = AUTO_QUANTIZER_MAPPING.get("dobi_svd")
        # The package's own reads all checkpoints. One of another checkpoint may be older than what this one holds.
        if known is None or known.__name__ == CompressedLoader.__name__:
            AUTO_QUANTIZATION_CONFIG_MAPPING["dobi_svd"] = CheckpointConfig
            AUTO_QUANTIZER_MAPPING["dobi_svd"] = CompressedLoader
        own = (getattr(kwargs.get("config"), "auto_map", None) or {}).get(f"{OWN_CODE}{cls.auto_class.__name__}")
        if own is not None:  # a model whose architecture is code of its own, which the user has trusted to get here
            from transformers.dynamic_module_utils import get_class_from_dynamic_module
            from transformers.models.auto import auto_factory

            known_files = ("cache_dir", "token", "revision", "code_revision", "local_files_only", "force_download")
            where = {key: kwargs[key] for key in known_files if key in kwargs}
            model_class: Any = get_class_from_dynamic_module(own, name, **where)
            # What transformers does with remote code itself; private, and absent from some versions.
            with_generation = getattr(auto_factory, "add_generation_mixin_to_remote_model", lambda given: given)
            model_class.register_for_auto_class(cls.auto_class.__name__)  # or its code is not saved with it again
            # transformers has put this entry down for the configuration's class; from_config wants the model's.
            cls.auto_class.register(type(kwargs["config"]), model_class, exist_ok=True)
            return with_generation(model_class).from_pretrained(name, *args, **kwargs)
        kwargs["trust_remote_code"] = False
        return cls.auto_class.from_pretrained(name, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Return the model without values, its linears compressed: for programs that load the tensors themselves.

        vLLM's transformers backend is one. Parameters are on meta; buffers are where new tensors are put.

        Raises:
            ValueError: what the model needs cannot be done so; says what to do.
        """
        values = getattr(config, "quantization_config", None)
        if values is None:  # vLLM has to be told so, or it refuses a format that it does not know
            values = type(config).get_config_dict(config._name_or_path)[0]["quantization_config"]
        loader = CompressedLoader(CheckpointConfig(**values), pre_quantized=True)
        packed = [name for name, encoding in loader.encodings.items() if encoding.quant_method != "dobi_svd"]
        own = f"{OWN_CODE}{cls.auto_class.__name__}" in (getattr(config, "auto_map", None) or {})
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        for refused, why in (
            (packed, f"its matrices in {', '.join(packed)} are loaded by another library"),
            (own, "its architecture is code of its own"),
            (distributed and torch.distributed.get_world_size() > 1, "several processes would have to share it"),
        ):
            if refused:
                raise ValueError(
                    f"{config._name_or_path} cannot be built without the package, {why}: pip install optimum-dobisvd "
                    "beside vLLM, whose plugin it brings, or load the checkpoint with from_pretrained"
                )
        model = loader._process_model_before_weight_loading(
            cls.auto_class.from_config(config, trust_remote_code=False, **kwargs)
        )
        for module in compressed_linears(model).values():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))
        return model


def __getattr__(name: str) -> Any:
    """`DobiSVDAutoModelForCausalLM` and so on: one entry for every auto class, made when transformers asks for it.

    One for each, because no version of transformers tells an entry reliably which auto class the user called.
    """
    auto_class = getattr(transformers, name.removeprefix("DobiSVD"), None) if name.startswith("DobiSVDAuto") else None
    if auto_class is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (_Entry,), {"auto_class": auto_class, "__module__": __name__})
