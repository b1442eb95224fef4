"""The figures on disk, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimum_dobisvd.atomic_files import write_text_atomically

from .rows import Row
from .settings import Settings, decide_alike


class Results:
    """The figures of one setting.

    Args:
        path: the file; lines of other settings in it are left alone and not seen.
        settings: what decides the figures.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        self._settings = settings.deciding()
        self._device = settings.device
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete, _, broken_off = text.rpartition("\n")
        if broken_off:  # by a kill in the middle of a line, to which the next one would be glued
            write_text_atomically(path, f"{complete}\n" if complete else "")
        lines = [json.loads(line) for line in complete.splitlines()]
        self.lines = [line for line in lines if decide_alike(line["step"], line["settings"], self._settings)]

    @property
    def devices(self) -> list[str]:
        """The devices that speeds were taken on."""
        return sorted({line["device"] for line in self.lines if line["step"] == "speed"})

    def found(self, row: Row, healed: bool, step: str, device: str | None = None) -> dict[str, Any] | None:
        """Return the last figures of a step, None if it was not done with the row as it is now.

        Speeds are those of a device, by default of that of the settings.
        """
        wanted = (row.name, row.recipe, healed, step)
        for line in reversed(self.lines):
            here = step != "speed" or line["device"] == (device or self._device)
            if here and (line["row"], line["recipe"], line["healed"], line["step"]) == wanted:
                return dict(line["found"])
        return None

    def add(self, row: Row, healed: bool, step: str, found: dict[str, Any]) -> None:
        """Append figures, to the file as well."""
        line = {
            "row": row.name,
            "healed": healed,
            "step": step,
            "found": found,
            "device": self._device,
            "recipe": row.recipe,
            "settings": self._settings,
        }
        self.lines.append(line)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
