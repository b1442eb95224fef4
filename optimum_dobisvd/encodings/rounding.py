"""How the codes of a linear are chosen, whatever encoding they are stored in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .learned_rounding import LearnedRoundingSettings

ROUNDINGS = ("nearest", "feedback", "learned")
"""Each value to the nearest code; error feedback on the Gram of a linear's inputs (GPTQ); descent on block outputs."""


@dataclass(frozen=True)
class Rounding:
    """The algorithm that chooses codes, and its settings.

    Attributes:
        algorithm: one of `ROUNDINGS`.
        learned: settings of the descent; None unless the algorithm is `learned`.
        without_text: whether values are rounded to the nearest code where there is no text to do better on.
    """

    algorithm: str
    learned: LearnedRoundingSettings | None = None
    without_text: bool = False

    @property
    def reads_text(self) -> bool:
        """Whether it is calibrated on text."""
        return self.algorithm != "nearest"

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
        if chosen != "learned":
            if settings:
                raise ValueError(
                    f"rounding_settings has {next(iter(settings))!r}, and rounding {chosen!r} has no settings: leave "
                    "it out, or take rounding='learned'"
                )
            return self if algorithm is None else Rounding(chosen)
        return Rounding(chosen, replace(self.learned or LearnedRoundingSettings(), **_settings_of_learned(settings)))


def _settings_of_learned(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of `learned`. ValueError for one that there is not, naming a near one."""
    known = [field.name for field in fields(LearnedRoundingSettings)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            raise ValueError(f"rounding_settings has no {key!r}; {hint}")
    return dict(settings)
