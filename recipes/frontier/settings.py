"""The settings of a run, and which of them decide which figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TASKS = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "mathqa", "boolq")

_WHERE = ("work", "data_dir", "statistics", "device")  # places; but for speeds they change no figure
_EVALUATING = ("eval_dataset", "eval_windows", "limit")
_HEALING = ("heal_steps", "lora_rank", "lora_rate")
_NOT_SPEEDS = (*_EVALUATING, "heal_steps", "lora_rate")  # longer training gives other weights in the same encoding


@dataclass(frozen=True)
class Settings:
    """Files and numbers of one run; windows are counted in tokens.

    Attributes:
        model: a folder, or a hub id.
        dataset: train text, to calibrate and to heal on.
        eval_dataset: texts to evaluate on; only measured, never chosen by.
        data_dir: the files of the tasks (`recipes/README.md`).
        work: folder of the checkpoints.
        statistics: of an earlier run with the same text, else below `work`.
        device: where all is computed, e.g. `cuda`; written beside every figure.
        limit: examples of each task.
        rounding_windows: what GPTQ and bitsandbytes' rounding are calibrated on; the first of `nsamples`.
        off_grid_steps, off_grid_rate: of the training that moves the dense model off its grid, all weights.
    """

    model: str
    dataset: str
    eval_dataset: tuple[str, ...]
    data_dir: str
    work: str
    statistics: str | None = None
    device: str = "cpu"
    limit: int = 200
    nsamples: int = 96
    seqlen: int = 1024
    rounding_windows: int = 16
    eval_windows: int = 8
    heal_steps: int = 50
    train_batch: int = 2
    train_seqlen: int = 512
    lora_rank: int = 8
    lora_rate: float = 1e-3
    off_grid_steps: int = 50
    off_grid_rate: float = 1e-4
    seed: int = 0

    def deciding(self) -> dict[str, Any]:
        """Return what is written beside a figure, without the folders of a machine."""
        values = {key: value for key, value in asdict(self).items() if key not in _WHERE}
        named = {key: Path(values[key]).name for key in ("model", "dataset")}
        return {**values, **named, "eval_dataset": [Path(name).name for name in self.eval_dataset]}

    def making(self, healed: bool) -> dict[str, Any]:
        """Return what of these decides a checkpoint."""
        others = _EVALUATING if healed else (*_EVALUATING, *_HEALING)
        return {key: value for key, value in self.deciding().items() if key not in others}


def decide_alike(step: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the figures of a step are the same ones by two `Settings.deciding()`."""
    without = _NOT_SPEEDS if step == "speed" else ()
    return all(one.get(key) == other.get(key) for key in {*one, *other} if key not in without)
