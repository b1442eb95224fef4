"""The settings of the rank training, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Mode = Literal["fixed_basis", "activation"]

DIRECTIONS_OF = "kfac"
"""The factorizer whose squared singular values are nats per token: an importance score for every direction."""


@dataclass(frozen=True)
class RankTraining:
    """Settings of the rank training.

    Attributes:
        optimizer: `adam`, the paper's, which moves real ranks along the gradient; or `importance`, which measures the
            importance of every singular direction to the loss and keeps the most important ones (see
            `DirectionOptimizer`). None: `importance` for the allocation `dobi_fixed_basis` of kfac factors, `adam`
            elsewhere.
        steps: number of optimizer steps.
        windows: calibration windows per step, cut to `seqlen` tokens where that is given.
        seqlen: tokens in a window; None: those of the calibration.
        learning_rate: of `adam`, as a share of each matrix's largest useful rank, by default 0.02; decays along a
            cosine.
        width: of `adam`: softness of the gates in the first and in the last step, as shares of the largest useful
            rank, by default 0.05 and 0.02: `beta` is `1 / (width * rank)`, and at most the paper's 10. At a `beta` of
            10 from the start, as in the paper, an integer rank has no gradient.
        held_out: number of calibration windows that nothing else is computed from; the ranks with the lowest loss on
            them are kept.
        evaluate_every: steps from one evaluation on the held-out windows to the next.
        patience: evaluations without improvement after which the training stops.

    Raises:
        TypeError: a value of the wrong type; names the field.
        ValueError: a value out of range; names the field.
    """

    optimizer: Literal["adam", "importance"] | None = None
    steps: int = 24
    windows: int = 2
    seqlen: int | None = None
    learning_rate: float | None = None
    width: tuple[float, float] | None = None
    held_out: int = 8
    evaluate_every: int = 6
    patience: int = 3

    def __post_init__(self) -> None:
        if self.optimizer not in (None, "adam", "importance"):
            raise ValueError(f"training: optimizer is 'adam' or 'importance', got {self.optimizer!r}")
        for name in ("steps", "windows", "held_out", "evaluate_every", "patience"):
            _check_count(name, getattr(self, name), 1)
        if self.seqlen is not None:
            _check_count("seqlen", self.seqlen, 2)
        if self.learning_rate is not None:
            _check_share("learning_rate", self.learning_rate)
        if self.width is None:
            return
        if not isinstance(self.width, list | tuple) or len(self.width) != 2:
            raise ValueError(f"training: width is a pair, from and to, got {self.width!r}")
        for value in self.width:
            _check_share("width", value)
        object.__setattr__(self, "width", tuple(float(value) for value in self.width))

    def optimizer_for(self, mode: Mode, metric: str, factorization: str) -> Literal["adam", "importance"]:
        """Return the optimizer that was asked for, or the default one.

        Args:
            mode: what is truncated, see `learning.learn`.
            metric: the factorizer whose spectra the ranks were allocated by.
            factorization: the factorizer of the factors.

        Raises:
            ValueError: the optimizer cannot work with these, or a setting belongs to the other optimizer.
        """
        has_scores = mode == "fixed_basis" and metric == factorization == DIRECTIONS_OF
        chosen = self.optimizer or ("importance" if has_scores else "adam")
        if chosen == "importance" and not has_scores:
            raise ValueError(
                "training: optimizer 'importance' corrects the importance scores of kfac's directions, with the "
                "allocation dobi_fixed_basis and the factorization kfac; use 'adam' here"
            )
        for name in ("learning_rate", "width"):
            if chosen == "importance" and getattr(self, name) is not None:
                raise ValueError(
                    f"training: {name} is a setting of optimizer 'adam', and this training's is 'importance': drop "
                    "it, or set optimizer to 'adam'"
                )
        return chosen

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankTraining:
        """Build from JSON values. ValueError names an unknown key and lists the known ones."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"training: unknown key {key!r}; known keys: {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `from_dict` reads them back."""
        return {**asdict(self), "width": None if self.width is None else list(self.width)}


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"training: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"training: {name} must be at least {least}, got {value}")


def _check_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"training: {name} must be a number, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"training: {name} is a share, 0 < {name} <= 1, got {value}")
