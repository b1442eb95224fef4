"""The compression of one model, top to bottom: validate, collect, allocate, factorize, quantize."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import replace
from typing import Any

import torch

from .allocation.plan import Plan
from .calibration.dataset import CalibrationWindows
from .checkpoint.hf_quantizer import attach
from .config import DobiSVDConfig
from .learning.curve import TrainingCurve
from .learning.learn import learn_ranks
from .model.experts import linearize, settle
from .model.footprint import checkpoint_bytes, macs_per_token, resident_bytes
from .pipeline.allocate import allocate, measure_losses, predicted_increase
from .pipeline.collect import borrowed_by, collect, quantization_runner
from .pipeline.factorize import Replacement, factorize
from .pipeline.job import Job
from .pipeline.learn_rounding import check_runnable
from .pipeline.quantize import quantize
from .pipeline.stages import Stages
from .pipeline.validate import (
    LEARNING,
    check_basis,
    check_loss,
    check_weights,
    layout_of,
    prepare,
    refuse_offloaded,
)
from .report.report import CompressionReport, module_report
from .report.write import write_beside
from .statistics.fingerprint import fingerprint

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

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return self.config.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> DobiSVDQuantizer:
        """Return a quantizer from what `to_dict` gave, which has nothing of one run (a dataset in memory, paths)."""
        return cls(DobiSVDConfig.from_dict(config_dict))

    def prepare(self, model: Any, tokenizer: Any = None, windows: CalibrationWindows | None = None) -> Job:
        """Check all that can be refused before weights are read; the model may be on meta. See `pipeline.validate`."""
        return prepare(model, self.config, tokenizer, windows)

    def quantize_model(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        windows: CalibrationWindows | None = None,
        undo_on_error: bool = True,
    ) -> Any:
        """Calibrate, allocate, factorize, and replace the model's linears by compressed ones; returns the same model.

        An error half-way puts the dense linears back, for which they are kept until the end; with
        `undo_on_error=False` each is freed as soon as it is replaced, and an error leaves a model fit for nothing.
        `windows` are calibration windows that were drawn before. `plan` and `report` of this object are set, and
        `dobisvd_plan` and `dobisvd_report` of the model, which its `save_pretrained` writes beside the checkpoint.

        Raises:
            ValueError: a model, dataset, plan or setting that cannot work; said before any long computation.
        """
        return self.run(model, self.prepare(model, tokenizer, windows), undo_on_error)

    def run(self, model: Any, job: Job, undo_on_error: bool = True) -> Any:
        """Do a job that `prepare` made for this model, which may have been on meta then. As `quantize_model`."""
        with torch.inference_mode(False), torch.no_grad():  # parameters made in inference mode could never be trained
            experts = linearize(model)
            try:
                if experts:  # their linears are others than those that were checked
                    job = replace(job, layout=layout_of(model, job.config))
                check_weights(model, job.config, job.layout)
                check_loss(model, job)
                runner = quantization_runner(model, job) if job.config.encoding.needs_dense else None
                if runner is not None:
                    check_runnable(runner, job.config.encoding)
                if job.config.encoding.settings is not None or job.config.encoding.waits:
                    refuse_offloaded(job.layout.linears)
                if job.held_out is not None:
                    refuse_offloaded(job.layout.linears, LEARNING)
                for module in experts.values():
                    module.release()
                return self._compress(model, job, undo_on_error)
            finally:
                settle(model)

    def _compress(self, model: Any, job: Job, undo_on_error: bool) -> Any:
        stages, config, layout, before = Stages(), job.config, job.layout, _footprint(model, "dense")
        store, basis = None, None
        with stages.stage("statistics"):
            if job.windows is not None:
                identity = fingerprint(model, job.windows)
                basis = job.basis_of(identity)
                check_basis(job.given_plan, basis)
                store = collect(model, job, job.windows, identity)
        with stages.stage("allocation"):
            losses = measure_losses(job, store)
            plan = allocate(job, store, losses)
            _warn_of_unused_quantization(plan, job)
        if job.held_out is not None:
            with stages.stage("rank training"):
                modules, self.training_curve = learn_ranks(model, job, plan, store)
                named = any(module.directions is not None for module in modules.values())
                plan = replace(plan, modules=modules, basis=basis if named else None)
        targets, coverage = layout.targets, layout.coverage
        with stages.stage("factorization"), Replacement(model, job, plan, undo_on_error) as replacement:
            factorize(model, job, plan, store, replacement)
            runner = quantization_runner(model, job)
            quantize(model, config.encoding, runner, replacement.dense_linears())
        report = CompressionReport(
            model=os.path.basename(str(getattr(model, "name_or_path", "") or type(model).__name__).rstrip("/")),
            method=config.method,
            ratio=config.ratio,
            dataset=job.windows.description if job.windows is not None else None,
            modules=[
                module_report(target, plan.modules[target.name], replacement.errors.get(target.name, 0.0))
                for target in targets
            ],
            coverage=coverage,
            left_dense=layout.describe_left_dense(),
            **before,
            **_footprint(model, "compressed"),
            seconds=stages.seconds,
            peak_bytes=stages.peak_bytes,
            predicted_increase=predicted_increase(plan, store, job.method.factorization, losses),
            borrowed=borrowed_by(layout, store) if job.method.statistics else [],
        )
        self.plan, self.report = plan, report
        self._attach(model, job, plan, report)
        return model

    def _attach(self, model: Any, job: Job, plan: Plan, report: CompressionReport) -> None:
        """Have the model know what it is, and write plan and report beside itself when it is saved."""
        curve = self.training_curve
        model.dobisvd_plan, model.dobisvd_report, model.dobisvd_training = plan, report, curve
        model.dobisvd_documents = functools.partial(
            write_beside, plan=plan, report=report, curve=curve, pictures=False
        )
        model.dobisvd_is_new = True
        dataset = str(job.windows.description.get("dataset")) if job.windows is not None else None
        attach(model, job.config.with_plan(plan, dataset=dataset))

    def save(self, model: Any, save_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        """`model.save_pretrained(save_dir, **kwargs)`, with plan, report and pictures beside the checkpoint."""
        report = getattr(model, "dobisvd_report", None)
        if report is None:
            raise ValueError("this model was not compressed yet: call quantize_model first")
        model.save_pretrained(save_dir, **kwargs)
        if kwargs.get("is_main_process", True):
            write_beside(save_dir, model.dobisvd_plan, report, model.dobisvd_training)


def _footprint(model: Any, state: str) -> dict[str, Any]:
    """What a model computes per token, and its bytes on disk and in memory, as fields of the report."""
    figures = {"macs": macs_per_token, "model_bytes": checkpoint_bytes, "memory_bytes": resident_bytes}
    return {f"{state}_{name}": measure(model) for name, measure in figures.items()}


def _warn_of_unused_quantization(plan: Plan, job: Job) -> None:
    """Warn where a quantization was asked for and no matrix is stored so."""
    made = job.config.encoding
    encodings = sorted({module.encoding for module in plan.modules.values()})
    if made.settings is None or {made.name, *made.alternatives} & set(encodings):
        return
    logger.warning(
        "no matrix is quantized to %s: %s (%s); %s",
        made.name,
        "at this size there is room for better" if job.given_plan is None else "the plan names other encodings",
        ", ".join(encodings),
        "lower ratio or budget" if job.given_plan is None else f"name {made.name} in it",
    )


def load_quantized_model(save_dir: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a compressed model; `AutoModelForCausalLM.from_pretrained(save_dir, **kwargs)` does the same."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(save_dir, **kwargs)
