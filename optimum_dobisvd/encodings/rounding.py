"""How the codes of a linear are chosen, whatever encoding they are stored in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .learned_rounding import LearnedRoundingSettings

ROUNDINGS = ("nearest", "feedback", "learned")
"""Each value to the nearest code; error feedback on the Gram of a linear's inputs (GPTQ); descent on block outputs."""
TARGETS = ("compressed", "dense")
"""What error feedback keeps a linear's outputs near to, on the inputs that the quantized linears before it give: what
it gives unrounded on these inputs, or on those of the dense model."""


@dataclass(frozen=True)
class Rounding:
    """The algorithm that chooses codes, and its settings.

    Attributes:
        algorithm: one of `ROUNDINGS`.
        learned: settings of the descent; None unless the algorithm is `learned`.
        target: of `feedback`, one of `TARGETS`.
        without_text: whether values are rounded to the nearest code where there is no text to do better on.
    """

    algorithm: str
    learned: LearnedRoundingSettings | None = None
    target: str = "compressed"
    without_text: bool = False

    @property
    def reads_text(self) -> bool:
        """Whether it is calibrated on text."""
        return self.algorithm != "nearest"

    @property
    def needs_dense(self) -> bool:
        """Whether it runs the dense model beside the compressed one, block by block."""
        return self.learned is not None or self.target == "dense"

    @property
    def needs_text(self) -> bool:
        """Whether it can do nothing without."""
        return self.reads_text and not self.without_text

    def changed(self, algorithm: str | None, settings: Mapping[str, Any]) -> Rounding:
        """Return what a user's `rounding` and `rounding_settings` make of it; what they leave open stays.

        Raises:
            ValueError: an unknown algorithm, or a setting that it does not have, or not with such a value.
        """
        chosen = self.algorithm if algorithm is None else algorithm
        if chosen not in ROUNDINGS:
            raise ValueError(f"rounding is one of {', '.join(map(repr, ROUNDINGS))}, got {algorithm!r}")
        _check_settings(chosen, settings)
        if chosen == "learned":
            return Rounding(chosen, replace(self.learned or LearnedRoundingSettings(), **settings))
        target = settings.get("target", "compressed")
        if target not in TARGETS:
            raise ValueError(f"rounding_settings: target is one of {', '.join(map(repr, TARGETS))}, got {target!r}")
        if algorithm is None and target == self.target:
            return self
        return Rounding(chosen, target=target)


def _check_settings(algorithm: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that the algorithm does not have, naming a near one."""
    known = {
        "nearest": [],
        "feedback": ["target"],
        "learned": [field.name for field in fields(LearnedRoundingSettings)],
    }
    for key in settings:
        if key not in known[algorithm]:
            near = difflib.get_close_matches(key, known[algorithm], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known[algorithm]) or 'none'}"
            raise ValueError(f"rounding_settings has {key!r}, which rounding {algorithm!r} has not; {hint}")
