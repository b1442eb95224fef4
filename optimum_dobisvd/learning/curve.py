"""What a rank training leaves behind: losses and ranks, step by step, as a JSON file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..atomic_files import write_text_atomically

CURVE_NAME = "dobisvd_training.json"


@dataclass
class Step:
    """One optimizer step: the loss on its windows, and the real ranks it was taken at, None for a dense matrix."""

    loss: float
    ranks: list[float | None]


@dataclass
class Evaluation:
    """The loss on the held-out windows with whole ranks, after so many steps."""

    step: int
    loss: float


@dataclass
class TrainingCurve:
    """`names` are the matrices whose ranks were learned, in the order of the ranks of every step.

    `full` are their numbers of singular values. `kept` are the whole ranks that were kept (None: dense), reached after
    step `best`; `stopped` says why the training ended before its last step, if it did.
    """

    mode: str
    names: list[str]
    full: list[int]
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    best: int = 0
    kept: list[int | None] = field(default_factory=list)
    stopped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingCurve:
        """Reads what `to_dict` gave. KeyError or TypeError where it was not that."""
        steps = [Step(**step) for step in values["steps"]]
        evaluations = [Evaluation(**found) for found in values["evaluations"]]
        return cls(**{**values, "steps": steps, "evaluations": evaluations})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `dobisvd_training.json` into a folder."""
        path = Path(folder) / CURVE_NAME
        write_text_atomically(path, json.dumps(self.to_dict()) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TrainingCurve | None:
        """Read the curve beside a checkpoint; None if there is none. ValueError names a damaged file."""
        path = Path(folder) / CURVE_NAME
        if not path.exists():
            return None
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); compress again to write it anew") from error
