"""A store of the statistics of one model on one set of windows: safetensors and JSON in a folder, or in memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic_files import write_atomically, write_text_atomically
from .collect import BlockStatistics, InputStatistics
from .fingerprint import changes, differing_fields
from .gradients import SCALARS, GradientStatistics
from .packing import packed_length, unpack, unpacked_size

FORMAT_VERSION = 1
INDEX_NAME = "statistics.json"
GRADIENTS_NAME = "gradients.json"


class StatisticsStore:
    """Statistics by block. With a folder, each finished block is written at once, and a killed run resumes after it.

    Files: `statistics.json` (format version, fingerprint, block names), `block-00000.safetensors` per block
    (`{input}.gram` packed float32 triangle, `{input}.abs_mean`); once computed `spectra-{metric}.safetensors`, and
    `losses-{format}.safetensors`. With gradients also `gradients.json` (their settings) and
    `gradients-00000.safetensors` per block (`{linear}.gram`).
    """

    def __init__(
        self, fingerprint: dict[str, Any], blocks: list[str], folder: str | os.PathLike[str] | None = None
    ) -> None:
        """Open the store in a folder, or create it.

        `fingerprint` is what `statistics.fingerprint` returned, `blocks` the names of the model's blocks in order.
        Without a folder the statistics are kept in memory.

        Raises:
            ValueError: the folder holds something else, a damaged store, or one of other weights, text or settings
                (names the fields that differ).
        """
        self.fingerprint, self._blocks = fingerprint, blocks
        self._folder = Path(folder) if folder is not None else None
        self._memory: dict[str, BlockStatistics] = {}
        self._gradient_settings: dict[str, Any] | None = None
        self._gradients: dict[str, dict[str, GradientStatistics]] = {}
        self._last: tuple[str, BlockStatistics] | None = None
        self._computed: dict[str, dict[str, Tensor]] = {}
        if self._folder is None:
            return
        path = self._folder / INDEX_NAME
        if path.exists():
            self._check_index(path)
        elif self._folder.exists() and not _is_empty(self._folder):
            raise ValueError(f"{self._folder} exists and is not a statistics store; name an empty or new folder")
        else:
            index = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "blocks": blocks}
            write_text_atomically(path, json.dumps(index, indent=2) + "\n")

    def _check_index(self, path: Path) -> None:
        with _readable(path, "delete the folder to collect statistics again"):
            index = json.loads(path.read_text(encoding="utf-8"))
            version, stored, blocks = index["format_version"], dict(index["fingerprint"]), list(index["blocks"])
        _require_version(path, version)
        differences = differing_fields(stored, self.fingerprint)
        if blocks != self._blocks:
            differences.append(f"blocks: {len(blocks)} in the store, {len(self._blocks)} now")
        self._require_none(differences, "statistics")

    def _require_none(self, differences: list[str], what: str) -> None:
        if differences:
            raise ValueError(
                f"the {what} in {self._folder} do not belong to this run. {'; '.join(differences)}. "
                "Use the settings they were collected with, or another folder"
            )

    def has(self, block: str) -> bool:
        """Return whether the store has a block's statistics."""
        return block in self._memory if self._folder is None else self._path(block).exists()

    @property
    def is_complete(self) -> bool:
        """Whether the store has the statistics of every block."""
        return all(self.has(block) for block in self._blocks)

    def put(self, block: str, statistics: BlockStatistics) -> None:
        """Add the statistics of a block."""
        if self._folder is None:
            self._memory[block] = statistics
            return
        tensors = {f"{name}.abs_mean": inputs.abs_mean for name, inputs in statistics.inputs.items()}
        tensors |= {f"{name}.gram": inputs.gram for name, inputs in statistics.inputs.items()}
        tokens = {name: inputs.tokens for name, inputs in statistics.inputs.items()}
        # One key: safetensors writes several in random order, and a resumed run must give the same bytes.
        metadata = {"statistics": json.dumps({"leader": statistics.input_key, "tokens": tokens})}
        write_atomically(self._path(block), lambda path: save_file(tensors, path, metadata=metadata))

    def block(self, block: str) -> BlockStatistics:
        """Return the statistics of a block. ValueError if there are none, or the file is damaged."""
        if self._folder is None:
            return self._memory[block]
        if not self.has(block):
            raise ValueError(f"{self._folder} has no statistics of {block} yet; collect them first")
        if self._last is None or self._last[0] != block:
            self._last = (block, _read_block(self._path(block)))
        return self._last[1]

    def open_gradients(self, settings: dict[str, Any]) -> None:
        """Prepare for gradient statistics: new ones, or those of an interrupted run with the same settings.

        Settings are JSON values, of which `tokens` is how many tokens of text the gradients are summed over.

        Raises:
            ValueError: the store has gradients of other settings (names the fields that differ), or a damaged file.
        """
        self._gradient_settings = settings
        if self._folder is None:
            return
        path = self._folder / GRADIENTS_NAME
        if path.exists():
            self._require_none(changes(_read_gradient_settings(path), settings), "gradients")
            return
        # Left by a run whose settings are unknown.
        computed = [*self._folder.glob("losses-*.safetensors"), self._folder / "spectra-kfac.safetensors"]
        for stale in [*self._folder.glob("gradients-*.safetensors"), *computed]:
            stale.unlink(missing_ok=True)
        write_text_atomically(path, json.dumps({"format_version": FORMAT_VERSION, **settings}, indent=2) + "\n")

    @property
    def gradient_tokens(self) -> int:
        """Tokens of text that the gradients are summed over. ValueError if the store has none."""
        if self._gradient_settings is None and self._folder is not None:
            path = self._folder / GRADIENTS_NAME
            self._gradient_settings = _read_gradient_settings(path) if path.exists() else None
        if self._gradient_settings is None:
            raise ValueError(
                f"the statistics in {self._folder or 'memory'} have no gradients, which this method's importance "
                "scores need: run `compress` with the calibration text and the same statistics folder to add them, or "
                "choose a method that reads none (svd_llm_v2)"
            )
        return int(self._gradient_settings["tokens"])

    def has_gradients(self, block: str) -> bool:
        """Return whether the store has a block's gradient statistics."""
        return block in self._gradients if self._folder is None else self._path(block, "gradients").exists()

    def put_gradients(self, block: str, gradients: dict[str, GradientStatistics]) -> None:
        """Add the gradient statistics of a block, by linear."""
        if self._folder is None:
            self._gradients[block] = gradients
            return
        described = {
            name: {"tokens": found.tokens, **{key: getattr(found, key) for key in SCALARS}}
            for name, found in gradients.items()
        }
        tensors = {f"{name}.gram": found.gram for name, found in gradients.items()}
        metadata = {"gradients": json.dumps(described)}
        write_atomically(self._path(block, "gradients"), lambda path: save_file(tensors, path, metadata=metadata))

    def gradients(self, block: str) -> dict[str, GradientStatistics]:
        """Return a block's gradient statistics by linear. ValueError if there are none, or the file is damaged."""
        if self._folder is None and block in self._gradients:
            return self._gradients[block]
        if not self.has_gradients(block):
            _ = self.gradient_tokens  # raises if there are no gradients at all
            raise ValueError(f"{self._folder or 'memory'} has no gradients of {block} yet; collect them first")
        return _read_gradients(self._path(block, "gradients"))

    def require(self, linears: Mapping[str, Iterable[str]]) -> None:
        """Raise ValueError, naming it, if one of these linears (by block) was excluded from the statistics."""
        for block, names in linears.items():
            known = self.block(block).input_key
            lacking = [name for name in names if name not in known]
            if lacking:
                raise ValueError(
                    f"the statistics in {self._folder or 'memory'} lack {lacking[0]} ({len(lacking)} linears of "
                    f"{block}): it was excluded when they were collected; exclude it again, or use another folder"
                )

    def spectra(self, metric: str) -> Mapping[str, Tensor] | None:
        """Return the singular values in a metric by linear, `min(m, n)` each; None if they are not in the store.

        ValueError names a damaged file.
        """
        return self._read(f"spectra-{metric}")

    def put_spectra(self, metric: str, spectra: dict[str, Tensor]) -> None:
        """Add the singular values in a metric by linear, so that another ratio need not compute them again."""
        self._keep(f"spectra-{metric}", spectra)

    def losses(self, format: str) -> Mapping[str, Tensor] | None:
        """Return what rounding costs in a format by linear; None if it is not in the store.

        ValueError names a damaged file.
        """
        return self._read(f"losses-{format}")

    def put_losses(self, format: str, losses: dict[str, Tensor]) -> None:
        """Add what rounding costs in a format by linear."""
        self._keep(f"losses-{format}", losses)

    def _read(self, what: str) -> Mapping[str, Tensor] | None:
        if what not in self._computed and self._folder is not None:
            path = self._folder / f"{what}.safetensors"
            if path.exists():
                with _readable(path, "delete it to compute it again"):
                    self._computed[what] = load_file(path)
        return self._computed.get(what)

    def _keep(self, what: str, tensors: dict[str, Tensor]) -> None:
        self._computed[what] = tensors
        if self._folder is not None:
            path = self._folder / f"{what}.safetensors"
            write_atomically(path, lambda beside: save_file({k: v.contiguous() for k, v in tensors.items()}, beside))

    def _path(self, block: str, what: str = "block") -> Path:
        if self._folder is None:
            raise TypeError("a store in memory has no files")
        return self._folder / f"{what}-{self._blocks.index(block):05d}.safetensors"


def _is_empty(folder: Path) -> bool:
    """Return whether a folder is empty but for what a run left that was killed while it wrote the index."""
    return folder.is_dir() and all(entry.name.startswith(f".{INDEX_NAME}.") for entry in folder.iterdir())


def full_gram(statistics: InputStatistics | GradientStatistics) -> Tensor:
    """Return the Gram as a full matrix, float64: `H` (`n x n`) of inputs or `G` (`m x m`) of gradients."""
    return unpack(statistics.gram, statistics.size)


@contextlib.contextmanager
def _readable(path: Path, remedy: str) -> Iterator[None]:
    """A context in which whatever goes wrong is a damage of this file: ValueError names it, and says what to do."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error


def _require_version(path: Path, version: Any) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT_VERSION}; use another folder")


def _read_block(path: Path) -> BlockStatistics:
    """Read the statistics of one block; names and sizes are checked before tensors. ValueError names the file."""
    with _readable(path, "delete this file to collect its block again"), safe_open(path, framework="pt") as file:
        described = json.loads((file.metadata() or {})["statistics"])
        input_key, tokens = described["leader"], described["tokens"]
        if not set(input_key.values()) <= tokens.keys():
            raise ValueError("a linear's input is missing")
        return BlockStatistics({name: _read_input(file, name, count) for name, count in tokens.items()}, input_key)


def _read_input(file: Any, name: str, tokens: int) -> InputStatistics:
    shape = file.get_slice(f"{name}.abs_mean").get_shape()
    length = file.get_slice(f"{name}.gram").get_shape()
    if len(shape) != 1 or length != [packed_length(shape[0])]:
        raise ValueError(f"the Gram of {name} has shape {length}, its channel means {shape}")
    return InputStatistics(shape[0], tokens, file.get_tensor(f"{name}.abs_mean"), file.get_tensor(f"{name}.gram"))


def _read_gradient_settings(path: Path) -> dict[str, Any]:
    with _readable(path, "delete it to collect the gradients again"):
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
        version = settings.pop("format_version")
        int(settings["tokens"])
    _require_version(path, version)
    return settings


def _read_gradients(path: Path) -> dict[str, GradientStatistics]:
    """Read the gradients of one block; sizes are checked before tensors. ValueError names the file."""
    found: dict[str, GradientStatistics] = {}
    with _readable(path, "delete this file to collect its block again"), safe_open(path, framework="pt") as file:
        for name, described in json.loads((file.metadata() or {})["gradients"]).items():
            shape = file.get_slice(f"{name}.gram").get_shape()
            size = unpacked_size(shape[0]) if len(shape) == 1 else 0
            if not size:
                raise ValueError(f"the gradient Gram of {name} has shape {shape}")
            scalars = {key: float(described[key]) for key in SCALARS}
            gram = file.get_tensor(f"{name}.gram")
            found[name] = GradientStatistics(size, int(described["tokens"]), gram, **scalars)
    return found
