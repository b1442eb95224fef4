"""The half of the quantizer that loads compressed checkpoints.

This module, `checkpoint`, `nn.dense_linear` and `nn.low_rank_linear` are also bundled with every checkpoint (see
`saving.modeling_source`), so they import nothing but torch, transformers and each other.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from ..nn.dense_linear import empty_low_rank, is_dense_linear, to_dense
from ..nn.low_rank_linear import LowRankLinear
from .checkpoint import check_factors, module_names_in


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
            if rank > limit:
                raise ValueError(f"{listed}: rank {rank} in config.json is above its largest possible rank {limit}")
            model.set_submodule(name, empty_low_rank(dense, rank, device="meta"))
        # The zero-size tensors under the dense names stop readers that do not know this format; this one does.
        ignored = {re.escape(f"{name}.weight") + "$" for pair in names.items() for name in pair}
        # Private, but there is no other way to say which keys will be left over. A list before transformers 5.12.
        known = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = (
            known | ignored if isinstance(known, set) else [*(known or ()), *sorted(ignored)]
        )
        if checkpoint_files:
            check_factors(model, checkpoint_files)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, LowRankLinear):
                model.set_submodule(name, to_dense(module))
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
