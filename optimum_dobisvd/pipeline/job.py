"""Everything that is decided before the first pass over a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from ..allocation.budget import Budget
from ..allocation.plan import Plan
from ..calibration.dataset import CalibrationWindows
from ..config import DobiSVDConfig
from ..methods import Method
from ..model.layout import Layout
from ..model.linears import weight_matrix


@dataclass(frozen=True)
class Job:
    """One compression of one model, checked.

    There is a `budget` unless a plan is given, and calibration `windows` where there is text. Learned ranks alone are
    judged on windows that are `held_out`.
    """

    config: DobiSVDConfig
    layout: Layout
    budget: Budget | None
    given_plan: Plan | None
    windows: CalibrationWindows | None = None
    held_out: CalibrationWindows | None = None
    quantization_windows: CalibrationWindows | None = None

    @property
    def method(self) -> Method:
        """The method's row, overridden columns put in."""
        return self.config.resolved_method()

    @property
    def device(self) -> torch.device:
        """Where factors are computed: the config's device, or that of the first weight (CPU if it is offloaded)."""
        if self.config.device is not None:
            return torch.device(self.config.device)
        home = weight_matrix(next(iter(self.layout.linears.values()))).device
        return home if home.type != "meta" else torch.device("cpu")

    @property
    def open_budget(self) -> Budget:
        """The budget. ValueError where a plan is given, which has none."""
        if self.budget is None:
            raise ValueError("a plan is given, so there is no budget to allocate")
        return self.budget

    def gradient_settings(self) -> dict[str, Any]:
        """Return what decides the gradient statistics, beside the model; JSON values."""
        if self.windows is None:
            raise ValueError("gradients are collected on calibration text, and there is none")
        config, chosen = self.config, self.windows.first(self.config.gradient_windows)
        settings = {"tokens": int(chosen.attention_mask.sum()), "windows": chosen.sha256(), "fisher": config.fisher}
        return {**settings, "seed": config.seed} if config.fisher == "sampled" else settings

    def basis_of(self, fingerprint: dict[str, Any]) -> str:
        """Return a digest of all that decides the singular directions of `kfac`: weights, text, gradients."""
        decides = [*(fingerprint[key] for key in ("weights", "tokens", "dtype")), self.gradient_settings()]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
