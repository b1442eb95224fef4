"""GPTQ's encoding with learned codes: what transformers' `AutoRoundConfig` asks for."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoRoundConfig, GPTQConfig

from .base import Feedback
from .gptq import GPTQ, GPTQ_BITS, check_group_size
from .gptq_linear import require_gptqmodel
from .gptq_rounding import packed_kernel
from .learned_rounding import LearnableLinear, LearnedRoundingSettings
from .settings import with_method

_NAME = re.compile(r"autoround([2348])(?:_g(\d+))?")
_STORED = ("bits", "group_size", "sym")
_LEARNING = {
    "iters": "steps",
    "nsamples": "nsamples",
    "seqlen": "seqlen",
    "batch_size": "batch_size",
    "lr": "learning_rate",
}
"""Options of auto-round that say how codes are learned, and what they are called here."""
_OF_LOADERS = ("quant_method", "backend", "packing_format")


class AutoRound(GPTQ):
    """GPTQ's tensors, whose codes are learned on the outputs of whole blocks (SignRound) instead of by error feedback.

    Checkpoints cannot be told from GPTQ's, and need nothing else to be read.
    """

    def __init__(self, bits: int, group_size: int, settings: AutoRoundConfig) -> None:
        stored = GPTQConfig(bits=bits, group_size=group_size, sym=settings.sym, act_group_aware=False)
        super().__init__(bits, group_size, stored)
        self._stored, self.settings, self.learned = stored, settings, _settings_of(settings)

    @classmethod
    def named(cls, name: str, settings: Any = None) -> GPTQ | None:
        if not isinstance(settings, AutoRoundConfig):
            return None
        found = GPTQ.named(name)
        return None if found is None else cls(found.bits, found.group_size, settings)

    @classmethod
    def from_setting(cls, setting: Any, *, strict: bool) -> GPTQ | None:
        """Take an `AutoRoundConfig`, one as a dictionary, or a name: `autoround3` (groups of 128), `autoround3_g32`.

        Names mean asymmetric grids.
        """
        if isinstance(setting, str):
            found = _NAME.fullmatch(setting)
            if found is None:
                return None
            setting = AutoRoundConfig(bits=int(found[1]), group_size=int(found[2] or 128), sym=False)
        if isinstance(setting, dict) and with_method(setting) == "auto-round":
            setting = AutoRoundConfig(**{key: value for key, value in setting.items() if key != "quant_method"})
        if not isinstance(setting, AutoRoundConfig):
            return None
        _check(setting)
        return cls(setting.bits, setting.group_size, setting)

    def remembered(self) -> Any:
        """Return the `GPTQConfig` of what is stored: a reader need not know how codes were chosen."""
        return GPTQ(self.bits, self.group_size, self._settings).remembered()

    def require(self) -> None:
        require_gptqmodel()

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        raise ValueError(f"codes of {self.name} are learned on whole blocks, which takes calibration text: name some")

    def learnable(self, linear: nn.Linear) -> LearnableLinear:
        size = linear.in_features if self.group_size == -1 else self.group_size
        return LearnableLinear(linear, self.bits, size, bool(self._settings.sym))

    @torch.no_grad()
    def from_learned(self, linear: LearnableLinear) -> nn.Module:
        step, zero = linear.grid()
        weight = ((linear.codes(step, zero) - zero) * step).flatten(1)
        rounded = nn.Linear(weight.shape[1], len(weight), bias=linear.bias is not None, device="meta")
        rounded.weight, rounded.bias = nn.Parameter(weight, requires_grad=False), linear.bias
        group_of_input = torch.arange(weight.shape[1], dtype=torch.int32) // (weight.shape[1] // step.shape[1])
        grid = (step.squeeze(-1), zero.squeeze(-1), group_of_input)
        return packed_kernel(rounded, grid, self.bits, self.group_size, self._settings)

    @property
    def _feedback(self) -> Feedback:
        # Losses are told as if error feedback chose the codes, important inputs first. Learned ones lose less.
        return Feedback(0.01)

    @property
    def _settings(self) -> GPTQConfig:
        return self._stored


def _settings_of(config: AutoRoundConfig) -> LearnedRoundingSettings:
    given = {ours: getattr(config, theirs) for theirs, ours in _LEARNING.items() if hasattr(config, theirs)}
    for theirs, ours in _LEARNING.items():
        value, whole = given.get(ours), theirs != "lr"
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if value is not None and not (fits and value > 0):
            kind = "a whole number of at least 1" if whole else "a number above 0"
            raise ValueError(f"AutoRoundConfig({theirs}={value!r}): it must be {kind}")
    return LearnedRoundingSettings(**{key: value for key, value in given.items() if value is not None})


def _check(config: AutoRoundConfig) -> None:
    known = (*_STORED, *_LEARNING, *_OF_LOADERS)
    for option, value in vars(config).items():
        if option not in known and value is not None:
            raise ValueError(
                f"AutoRoundConfig({option}={value!r}) says nothing that GPTQ's tensors can hold: leave it out (there "
                f"are {', '.join((*_STORED, *_LEARNING))}; what is to stay as it is goes into modules_to_not_convert)"
            )
    if config.bits not in GPTQ_BITS:
        raise ValueError(
            f"AutoRoundConfig(bits={config.bits}) cannot be stored: GPTQ's tensors have "
            f"{', '.join(map(str, GPTQ_BITS[:-1]))} or {GPTQ_BITS[-1]} bits"
        )
    check_group_size("AutoRoundConfig", config.group_size)
