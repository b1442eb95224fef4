"""The record of a rank training, losses and ranks step by step, as a JSON file."""

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
    """One optimizer step: the loss on its windows in nats per token, and the real ranks before it.

    Ranks are in the order of `TrainingCurve.names`, None for a dense matrix.
    """

    loss: float
    ranks: list[float | None]


@dataclass
class Evaluation:
    """Integer ranks after `step` optimizer steps, and their loss on the held-out windows in nats per token."""

    step: int
    loss: float


@dataclass
class TrainingCurve:
    """The record of one rank training.

    Attributes:
        mode: `fixed_basis` or `activation`.
        names, full: the matrices whose ranks were learned, and their numbers of singular values.
        steps, evaluations: every optimizer step, and every evaluation on the held-out windows.
        best: the number of steps after which the kept ranks were reached.
        kept: the integer ranks that were kept; None for a dense matrix.
        stopped: why the training ended before its last step; None if it did not.
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
        """Return JSON values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingCurve:
        """Build from what `to_dict` returned. KeyError or TypeError for a missing or unknown field."""
        steps = [Step(**step) for step in values["steps"]]
        evaluations = [Evaluation(**found) for found in values["evaluations"]]
        return cls(**{**values, "steps": steps, "evaluations": evaluations})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `dobisvd_training.json` into a folder, atomically; returns its path."""
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
