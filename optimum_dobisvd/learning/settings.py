"""How ranks are learned: the settings, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Mode = Literal["fixed_basis", "activation"]

DIRECTIONS_OF = "kfac"
"""The factorizer whose squared singular values are nats per token, so that directions can be priced one by one."""


@dataclass(frozen=True)
class RankTraining:
    """Settings of the rank training.

    Attributes:
        optimizer: `adam`, the paper's, which slides ranks; or `prices`, which measures what every singular direction
            is worth and chooses among them (see `DirectionOptimizer`). None: `prices` for the allocation
            `dobi_fixed_basis` of kfac factors, `adam` elsewhere.
        steps: how many optimizer steps.
        windows: calibration windows a step, cut to `seqlen` tokens where that is given.
        seqlen: tokens in a window; None: those of the calibration.
        learning_rate: of `adam`, in shares of each matrix's largest useful rank, by default 0.02; falls along a
            cosine.
        width: of `adam`: where the gates' softness starts and ends, as a share of the largest useful rank, by default
            0.05 and 0.02: `beta` is `1 / (width * rank)`, and at most the paper's 10. At a `beta` of 10 from the
            start, as in the paper, a whole rank has no gradient.
        held_out: windows of calibration text that nothing else is computed from; the ranks with the lowest loss on
            them are kept.
        evaluate_every: steps from one evaluation on them to the next.
        patience: evaluations without a gain after which the training stops.

    Raises:
        TypeError, ValueError: naming the field that cannot be.
    """

    optimizer: Literal["adam", "prices"] | None = None
    steps: int = 24
    windows: int = 2
    seqlen: int | None = None
    learning_rate: float | None = None
    width: tuple[float, float] | None = None
    held_out: int = 8
    evaluate_every: int = 6
    patience: int = 3

    def __post_init__(self) -> None:
        if self.optimizer not in (None, "adam", "prices"):
            raise ValueError(f"training: optimizer is 'adam' or 'prices', got {self.optimizer!r}")
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

    def optimizer_for(self, mode: Mode, metric: str, factorization: str) -> Literal["adam", "prices"]:
        """The optimizer for ranks priced in a metric and factors of a factorizer; their own if none was asked for.

        Raises:
            ValueError: it cannot serve there, or a setting is one of the other's.
        """
        priced = mode == "fixed_basis" and metric == factorization == DIRECTIONS_OF
        chosen = self.optimizer or ("prices" if priced else "adam")
        if chosen == "prices" and not priced:
            raise ValueError(
                "training: optimizer 'prices' corrects the prices of kfac's directions, with the allocation "
                "dobi_fixed_basis and the factorization kfac; use 'adam' here"
            )
        for name in ("learning_rate", "width"):
            if chosen == "prices" and getattr(self, name) is not None:
                raise ValueError(
                    f"training: {name} is a setting of optimizer 'adam', and this training's is 'prices': drop it, or "
                    "set optimizer to 'adam'"
                )
        return chosen

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankTraining:
        """From JSON values; an unknown key is an error."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"training: unknown key {key!r}; known keys: {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them back."""
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
