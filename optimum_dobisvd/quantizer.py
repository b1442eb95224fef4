"""The pipeline, top to bottom: layout -> statistics -> plan -> factors -> model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GPTQConfig

from .allocation.plan import Plan, PlannedModule
from .calibration.dataset import CalibrationWindows, load_windows
from .calibration.layout import Layout, checkpoint_bytes
from .calibration.loss import require_labels
from .checking import check_model
from .collecting import basis_of, block_runner, collect_statistics
from .config import DobiSVDConfig
from .factorization.factors import Factors
from .factorization.registry import factorization_named
from .learning.curve import TrainingCurve
from .learning.learn import check_learnable, learn_ranks
from .nn.dense_linear import weight_matrix
from .planning import budget_of, check_basis, given_plan, make_plan, predicted_increase, rounding_prices
from .replacement import Replacement
from .report.measure import Stages
from .report.report import CompressionReport, macs_per_token, module_report, resident_bytes
from .report.write import write_beside
from .stacking import check_inner, inner_windows, quantize_shells, refuse_offloaded
from .statistics.fingerprint import fingerprint
from .statistics.sample_bases import SampleBasisVisitor
from .statistics.spectra import PreparedInputs, decompositions, input_grams
from .statistics.store import StatisticsStore
from .storage.inner_forms import inner_form_named

logger = logging.getLogger(__name__)


class DobiSVDQuantizer:
    """Compresses a dense transformers model in place, in the manner of optimum's `GPTQQuantizer`.

    ```python
    quantizer = DobiSVDQuantizer(method="svd_llm_v2", ratio=0.8, dataset="wikitext2")
    model = quantizer.quantize_model(model, tokenizer)
    quantizer.save(model, "out")
    ```

    Args:
        config: a `DobiSVDConfig`; or its fields as keyword arguments.
    """

    def __init__(self, config: DobiSVDConfig | None = None, **kwargs: Any) -> None:
        if config is not None and kwargs:
            raise TypeError("pass a DobiSVDConfig or its fields, not both")
        self.config = config if config is not None else DobiSVDConfig.from_dict(kwargs)
        if self.config.is_compressed:
            raise ValueError("this config describes a compressed model; start from one without `modules`")
        self.plan: Plan | None = None
        self.report: CompressionReport | None = None
        self.training_curve: TrainingCurve | None = None
        self._windows: CalibrationWindows | None = None
        self._inner_windows: CalibrationWindows | None = None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        return self.config.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> DobiSVDQuantizer:
        """A quantizer from what `to_dict` gave, which has nothing of one run (a dataset in memory, paths)."""
        return cls(DobiSVDConfig.from_dict(config_dict))

    def quantize_model(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        windows: CalibrationWindows | None = None,
        undo_on_error: bool = True,
    ) -> Any:
        """Calibrate, allocate, factorize, and replace the model's linears by compressed ones.

        An error half-way puts the dense linears back, for which they are kept until the end; with
        `undo_on_error=False` each is freed as soon as it is replaced, and an error leaves a model fit for nothing.
        `windows` are calibration windows that `prepare` drew.

        Returns the same model. `plan` and `report` of this object are set, and `dobisvd_plan` and `dobisvd_report` of
        the model, which its `save_pretrained` writes beside the checkpoint.

        Raises:
            ValueError: a model, dataset, plan or setting that cannot work; said before any long computation.
        """
        with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode could never be trained
            return self._compress(model, *self.prepare(model, tokenizer, windows), undo_on_error)

    def _compress(
        self, model: Any, layout: Layout, given: Plan | None, windows: CalibrationWindows | None, undo_on_error: bool
    ) -> Any:
        targets = layout.targets
        if self.config.inner is not None:
            refuse_offloaded(layout.linears)
        stages = Stages()
        windows, held_out = self._split(windows)
        if self._inner_windows is self._windows:
            self._inner_windows = windows  # without those held out, which nothing but ranks is judged on
        self._check_labels(windows, held_out)
        if held_out is not None:
            check_learnable(layout)
        before = (macs_per_token(model), checkpoint_bytes(model), resident_bytes(model))
        with stages.stage("statistics"):
            store, basis = None, None
            if windows is not None:
                identity = fingerprint(model, windows)
                basis = basis_of(identity, self.config, windows)
                check_basis(given, basis)
                store = collect_statistics(model, layout, self.config, windows, identity)
        with stages.stage("allocation"):
            device = self._device(layout)
            roundings = rounding_prices(self.config, layout, store, device) if given is None else None
            plan = given or make_plan(self.config, layout, store, device, roundings)
            self._tell_unused_inner(plan, given)
        if given is None and windows is not None and held_out is not None:
            with stages.stage("rank training"):
                modules = self._learn(model, layout, plan, store, windows, held_out)
                named = any(module.directions is not None for module in modules.values())
                plan = replace(plan, modules=modules, basis=basis if named else None)
        with stages.stage("factorization"):
            errors = self._factorize(model, layout, plan, store, windows, undo_on_error)
        self.plan = plan
        self.report = CompressionReport(
            model=os.path.basename(str(getattr(model, "name_or_path", "") or type(model).__name__).rstrip("/")),
            method=self.config.method,
            ratio=self.config.ratio,
            dataset=windows.description if windows is not None else None,
            modules=[module_report(target, plan.modules[target.name], errors[target.name]) for target in targets],
            coverage=layout.coverage,
            left_dense=layout.describe_left_dense(),
            dense_macs=before[0],
            compressed_macs=macs_per_token(model),
            dense_model_bytes=before[1],
            compressed_model_bytes=checkpoint_bytes(model),
            dense_memory_bytes=before[2],
            compressed_memory_bytes=resident_bytes(model),
            seconds=stages.seconds,
            peak_bytes=stages.peak_bytes,
            predicted_increase=predicted_increase(plan, store, self.config.resolved_method().factorization, roundings),
        )
        model.dobisvd_plan, model.dobisvd_report, model.dobisvd_training = plan, self.report, self.training_curve
        model.dobisvd_is_new = True
        from .integrations.transformers_quantizer import attach

        attach(model, self.config.with_plan(plan, dataset=describe_dataset(windows)))
        return model

    def prepare(
        self, model: Any, tokenizer: Any = None, windows: CalibrationWindows | None = None
    ) -> tuple[Layout, Plan | None, CalibrationWindows | None]:
        """All that can be refused before weights are read; the model may be on meta.

        Returns the layout, the plan if the config gives one, and the calibration windows if it names a dataset: the
        ones passed in, if any, or newly drawn ones.
        """
        layout = check_model(model, self.config)
        if self.config.inner is not None:
            check_inner(self.config.inner, layout, self.config.min_coverage)
        given = given_plan(self.config, layout)
        if given is None:
            budget_of(self.config, layout)
        drawn = windows is None
        windows = windows if windows is not None else self._load_windows(model, tokenizer)
        if self.config.inner is not None and (drawn or windows is not self._windows):
            tokenizer = tokenizer or self.config.tokenizer or getattr(model, "name_or_path", None)
            self._inner_windows = inner_windows(self.config.inner, windows, None, tokenizer, **self._draw)
        self._windows = windows
        return layout, given, windows

    def save(self, model: Any, save_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        """`model.save_pretrained(save_dir, **kwargs)`, with plan, report and pictures beside the checkpoint."""
        report = getattr(model, "dobisvd_report", None)
        if report is None:
            raise ValueError("this model was not compressed yet: call quantize_model first")
        model.save_pretrained(save_dir, **kwargs)
        if kwargs.get("is_main_process", True):
            write_beside(save_dir, model.dobisvd_plan, report, model.dobisvd_training)

    def _tell_unused_inner(self, plan: Plan, given: Plan | None) -> None:
        """Warn where another library was asked for and no matrix is stored in its form."""
        storages = sorted({module.storage for module in plan.modules.values()})
        if self.config.inner is None or any(inner_form_named(name) is not None for name in storages):
            return
        logger.warning(
            "no matrix is quantized by inner: %s (%s); %s",
            "at this size there is room for better" if given is None else "the plan names other storages",
            ", ".join(storages),
            "lower ratio or budget" if given is None else f"name {self.config.storages[0]} in it",
        )

    def _device(self, layout: Layout) -> torch.device:
        """Where factors are computed: the config's device, or that of the first weight (CPU if it is offloaded)."""
        if self.config.device is not None:
            return torch.device(self.config.device)
        home = weight_matrix(next(iter(layout.linears.values()))).device
        return home if home.type != "meta" else torch.device("cpu")

    def _load_windows(self, model: Any, tokenizer: Any) -> CalibrationWindows | None:
        config = self.config
        if config.dataset is None:
            if config.resolved_method().needs_data or isinstance(config.inner, GPTQConfig):
                raise ValueError(
                    f"{self._reader_of_text} needs calibration text: pass dataset= (a name such as 'wikitext2', a "
                    "file, a list of strings, or token tensors), or use method='svd', which needs none"
                )
            return None
        tokenizer = tokenizer or config.tokenizer or getattr(model, "name_or_path", None) or None
        held_out = config.rank_training.held_out if self._learns else 0
        return load_windows(
            config.dataset,
            tokenizer,
            held_out=held_out,
            **self._draw,
        )

    @property
    def _draw(self) -> dict[str, int]:
        return {"nsamples": self.config.nsamples, "seqlen": self.config.seqlen, "seed": self.config.seed}

    @property
    def _reader_of_text(self) -> str:
        return f"method {self.config.method!r}" if self.config.resolved_method().needs_data else "GPTQ"

    @property
    def _learns(self) -> bool:
        return self.config.plan is None and self.config.resolved_method().learns

    def _split(
        self, windows: CalibrationWindows | None
    ) -> tuple[CalibrationWindows | None, CalibrationWindows | None]:
        """The windows to calibrate on, and those held out to judge learned ranks on."""
        if windows is None or not self._learns:
            return windows, None
        return windows.split(self.config.rank_training.held_out)

    def _check_labels(self, windows: CalibrationWindows | None, held_out: CalibrationWindows | None) -> None:
        """Refuse text without a single next token where a loss is to be taken of it."""
        if windows is not None and self.config.resolved_method().needs_gradients:
            require_labels(windows.first(self.config.gradient_windows).attention_mask, "the windows of the gradients")
        if windows is not None and held_out is not None:
            require_labels(windows.attention_mask, "the windows that ranks are learned on")
            require_labels(held_out.attention_mask, "the held-out windows")

    def _learn(
        self,
        model: Any,
        layout: Layout,
        start: Plan,
        store: StatisticsStore | None,
        windows: CalibrationWindows,
        held_out: CalibrationWindows,
    ) -> dict[str, PlannedModule]:
        """The ranks of `start` moved to where the loss wants them; sets `training_curve`."""
        method = self.config.resolved_method()
        modules, self.training_curve = learn_ranks(
            model,
            layout,
            start.modules,
            budget_of(self.config, layout),
            mode=method.learning_mode or "fixed_basis",
            metric=method.metric,
            row=factorization_named(method.factorization),
            spectra=store.spectra(method.metric) if store is not None else None,
            store=store,
            windows=windows,
            held_out=held_out,
            settings=self.config.rank_training,
            device=self._device(layout),
            journal=self._journal(start, windows, held_out),
        )
        return modules

    def _journal(self, start: Plan, windows: CalibrationWindows, held_out: CalibrationWindows) -> Path | None:
        """Where a training notes its state: beside the statistics, under the name of all that decides it."""
        if self.config.statistics is None:
            return None
        decides = [
            start.to_dict(),
            asdict(self.config.resolved_method()),
            self.config.to_dict(),
            self.config.rank_training.to_dict(),
            windows.sha256(),
            held_out.sha256(),
        ]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.config.statistics) / f"training-{digest}.safetensors"

    def _factorize(
        self,
        model: Any,
        layout: Layout,
        plan: Plan,
        store: StatisticsStore | None,
        windows: CalibrationWindows | None,
        undo_on_error: bool,
    ) -> dict[str, float | None]:
        """Replace every planned linear; returns relative output errors by name (dense ones 0, unknown ones None)."""
        ranks = {name: entry.rank for name, entry in plan.modules.items() if entry.rank is not None}
        storages = {name: entry.storage for name, entry in plan.modules.items() if not entry.is_dense}
        row = factorization_named(self.config.resolved_method().factorization)
        device = self._device(layout)

        with Replacement(model, layout, storages, device, undo_on_error) as replacement:
            if row.per_sample and windows is not None:

                def finished(block: str, factors: dict[str, Factors]) -> None:
                    for name, found in factors.items():
                        replacement.put(name, found, PreparedInputs(row, store, block, device).gram(name))

                visitor = SampleBasisVisitor(layout.linears_of, ranks, finished)
                block_runner(model, layout, self.config, windows).run(visitor, "second pass")
            else:
                for name, found, gram in decompositions(layout, row, store, device, ranks):
                    replacement.put(name, found.keep(plan.modules[name].kept), gram)
            for name, gram in input_grams(layout, row, store, device, storages.keys() - ranks.keys()):
                replacement.put_rounded(name, gram)
            if self.config.inner is not None:
                quantize_shells(
                    model,
                    layout.blocks,
                    self.config.inner,
                    self._inner_windows,
                    batch_size=self.config.batch_size,
                    device=self.config.device,
                )
        return {name: replacement.errors.get(name, 0.0) for name in plan.modules}


def describe_dataset(windows: CalibrationWindows | None) -> str | None:
    """The calibration text in words, for config.json and the report."""
    return str(windows.description.get("dataset")) if windows is not None else None


def load_quantized_model(save_dir: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a compressed model; `AutoModelForCausalLM.from_pretrained(save_dir, **kwargs)` does the same."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(save_dir, **kwargs)
