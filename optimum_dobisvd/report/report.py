"""The figures of one compressed model, as data that can be written to JSON and read back."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..allocation.plan import PlannedModule, planned_bytes
from ..atomic_files import write_text_atomically
from ..model.target import Target
from ..structures.format import format_named

REPORT_NAME = "dobisvd_report.json"


@dataclass(frozen=True)
class ModuleReport:
    """One target matrix: its shape, what became of it, and `||(W-W')X|| / ||WX||` over the calibration tokens.

    `rank` is None where it was not factorized; `error` is None where there were no statistics to measure it with, and
    where it was quantized after that.
    """

    name: str
    out_features: int
    in_features: int
    structure: str
    rank: int | None
    encoding: str
    bytes: int
    dense_bytes: int
    error: float | None

    @property
    def kind(self) -> str:
        """Last component of the name, e.g. `q_proj`."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def macs(self) -> int:
        """Multiply-adds per token."""
        format = format_named(self.structure, self.encoding)
        return format.macs(self.out_features, self.in_features, self.rank)

    @property
    def leaves_as_is(self) -> bool:
        """Whether the matrix was left as it is."""
        return format_named(self.structure, self.encoding).leaves_as_is


@dataclass
class CompressionReport:
    """The figures of one compression. `ratio` is None where a size was asked for.

    `*_macs`: multiply-adds per token of all linears, `lm_head` too, and all experts, chosen or not.

    `borrowed`: linears that were given too few calibration tokens, such as experts that are seldom chosen, and were
    compressed by the statistics of all experts of their layer.

    `*_model_bytes` are those of the checkpoint, `*_memory_bytes` those that the model's tensors were
    seen to take in memory, None where no model was loaded.

    `predicted_increase` is what the importance scores of `kfac` say the loss gains, in nats per token of the
    calibration text, where ranks were allocated by them.
    """

    model: str
    method: str
    ratio: float | None
    dataset: dict[str, Any] | None
    modules: list[ModuleReport]
    coverage: float
    left_dense: str
    dense_macs: int
    compressed_macs: int
    dense_model_bytes: int
    compressed_model_bytes: int
    dense_memory_bytes: int | None = None
    compressed_memory_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    predicted_increase: float | None = None
    borrowed: list[str] = field(default_factory=list)

    @property
    def target_bytes(self) -> int:
        """Bytes of the target matrices as stored."""
        return sum(module.bytes for module in self.modules)

    @property
    def dense_target_bytes(self) -> int:
        """Bytes of the same matrices dense."""
        return sum(module.dense_bytes for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with the three ratios that matter spelled out."""
        ratios = {
            "target_bytes": self.target_bytes / self.dense_target_bytes,
            "model_bytes": self.compressed_model_bytes / self.dense_model_bytes,
            "macs_per_token": self.compressed_macs / self.dense_macs,
        }
        return {**asdict(self), "ratios": {key: round(value, 6) for key, value in ratios.items()}}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `dobisvd_report.json` into a folder."""
        path = Path(folder) / REPORT_NAME
        write_text_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> CompressionReport:
        """Read the report beside a checkpoint. FileNotFoundError or ValueError name the file and the remedy."""
        path = Path(folder) / REPORT_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: the folder was not written by `optimum-cli dobisvd compress`"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values.pop("ratios")
            values["modules"] = [ModuleReport(**module) for module in values["modules"]]
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); compress again to write it anew") from error


def module_report(target: Target, module: PlannedModule, error: float | None) -> ModuleReport:
    """The report row of one target; bytes follow from its format."""
    return ModuleReport(
        target.name,
        target.out_features,
        target.in_features,
        module.structure,
        module.rank,
        module.encoding,
        planned_bytes(target, module),
        target.dense_bytes,
        error,
    )
