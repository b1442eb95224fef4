"""GPTQ's encoding with learned codes, unless others are asked for: what transformers' `AutoRoundConfig` means."""

from __future__ import annotations

import re
from typing import Any

from transformers import AutoRoundConfig, GPTQConfig

from .gptq import GPTQ, GPTQ_BITS, check_group_size
from .gptq_linear import require_gptqmodel
from .learned_rounding import LearnedRoundingSettings
from .rounding import Rounding
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
_OF_LOADERS = {"quant_method": "auto-round", "backend": "auto", "packing_format": "auto_round:gptq"}
"""Options that say how others would read it, at the values that say nothing."""


class AutoRound(GPTQ):
    """GPTQ's tensors, whose codes are learned on the outputs of whole blocks (SignRound) instead of by error feedback.

    Checkpoints cannot be told from GPTQ's, and need nothing else to be read.
    """

    def __init__(self, bits: int, group_size: int, settings: AutoRoundConfig) -> None:
        stored = GPTQConfig(bits=bits, group_size=group_size, sym=settings.sym, act_group_aware=False)
        super().__init__(bits, group_size, stored)
        self._stored, self.settings = stored, settings
        self.rounding = Rounding("learned", _settings_of(settings))

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
    for option, value in vars(config).items():
        known = option in (*_STORED, *_LEARNING) or value == _OF_LOADERS.get(option)
        if not known and value is not None:
            raise ValueError(
                f"AutoRoundConfig({option}={value!r}) says nothing that GPTQ's tensors can hold: leave it out (there "
                f"are {', '.join((*_STORED, *_LEARNING))}; what is to stay as it is goes into modules_to_not_convert)"
            )
    if not isinstance(config.sym, bool):
        raise ValueError(f"AutoRoundConfig(sym={config.sym!r}): it must be True or False")
    if config.bits not in GPTQ_BITS:
        raise ValueError(
            f"AutoRoundConfig(bits={config.bits}) cannot be stored: GPTQ's tensors have "
            f"{', '.join(map(str, GPTQ_BITS[:-1]))} or {GPTQ_BITS[-1]} bits"
        )
    check_group_size("AutoRoundConfig", config.group_size)
