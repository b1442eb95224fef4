"""The pipeline, top to bottom: layout -> statistics -> plan -> factors -> model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .allocation import allocation_named
from .allocation.budget import open_budget
from .allocation.patterns import resolve_overrides
from .allocation.plan import Plan
from .calibration.backward import BackwardRunner
from .calibration.dataset import CalibrationWindows, load_windows
from .calibration.layout import Layout, find_layout
from .calibration.loss import NextTokenLoss, require_labels
from .calibration.runner import BlockRunner
from .config import DobiSVDConfig
from .factorization.factors import Factors
from .factorization.registry import factorization_named
from .learning.curve import TrainingCurve
from .learning.learn import check_learnable, learn_ranks
from .nn.dense_linear import weight_matrix
from .replacement import Replacement
from .report.measure import Stages
from .report.report import CompressionReport, is_low_rank, macs_per_token, model_bytes, module_report
from .report.write import write_beside
from .statistics.collect import InputCollector
from .statistics.fingerprint import fingerprint
from .statistics.gradients import GradientCollector
from .statistics.sample_bases import SampleBasisVisitor
from .statistics.spectra import PreparedInputs, compute_spectra, decompositions
from .statistics.store import StatisticsStore

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
        """Calibrate, allocate, factorise, and replace the model's linears by `LowRankLinear`.

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
        stages = Stages()
        windows, held_out = self._split(windows)
        self._check_labels(windows, held_out)
        if held_out is not None:
            check_learnable(layout)
        before = (macs_per_token(model), model_bytes(model.parameters()))
        with stages.stage("statistics"):
            store = self._statistics(model, layout, windows)
        with stages.stage("allocation"):
            plan = given or make_plan(self.config, layout, store, self._device(layout))
        if given is None and windows is not None and held_out is not None:
            with stages.stage("rank training"):
                plan = self._learn(model, layout, plan, store, windows, held_out)
        with stages.stage("factorization"):
            errors = self._factorize(model, layout, plan, store, windows, undo_on_error)
        self.plan = plan
        self.report = CompressionReport(
            model=os.path.basename(str(getattr(model, "name_or_path", "") or type(model).__name__).rstrip("/")),
            method=self.config.method,
            ratio=self.config.ratio,
            dataset=windows.description if windows is not None else None,
            modules=[
                module_report(
                    target, plan.modules[target.name].rank, plan.modules[target.name].storage, errors[target.name]
                )
                for target in targets
            ],
            coverage=layout.coverage,
            left_dense=layout.describe_left_dense(),
            dense_macs=before[0],
            compressed_macs=macs_per_token(model),
            dense_model_bytes=before[1],
            compressed_model_bytes=model_bytes(model.parameters()),
            seconds=stages.seconds,
            peak_bytes=stages.peak_bytes,
            predicted_increase=predicted_increase(plan, store, self.config.resolved_method().factorization),
        )
        model.dobisvd_plan, model.dobisvd_report, model.dobisvd_training = plan, self.report, self.training_curve
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
        given = self._given_plan(layout)
        if given is None:
            open_budget(layout.targets, self.config.ratio, **budget_options(self.config, layout))
        return layout, given, windows if windows is not None else self._load_windows(model, tokenizer)

    def save(self, model: Any, save_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        """`model.save_pretrained(save_dir, **kwargs)`, with plan, report and pictures beside the checkpoint."""
        report = getattr(model, "dobisvd_report", None)
        if report is None:
            raise ValueError("this model was not compressed yet: call quantize_model first")
        model.save_pretrained(save_dir, **kwargs)
        if kwargs.get("is_main_process", True):
            write_beside(save_dir, model.dobisvd_plan, report, model.dobisvd_training)

    def _device(self, layout: Layout) -> torch.device:
        """Where factors are computed: the config's device, or that of the first weight (CPU if it is offloaded)."""
        if self.config.device is not None:
            return torch.device(self.config.device)
        home = weight_matrix(next(iter(layout.linears.values()))).device
        return home if home.type != "meta" else torch.device("cpu")

    def _given_plan(self, layout: Layout) -> Plan | None:
        plan = self.config.plan
        if plan is None:
            return None
        plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        plan.check(layout.targets)
        return plan

    def _load_windows(self, model: Any, tokenizer: Any) -> CalibrationWindows | None:
        config = self.config
        if config.dataset is None:
            if config.resolved_method().needs_data:
                raise ValueError(
                    f"method {config.method!r} needs calibration text: pass dataset= (a name such as 'wikitext2', a "
                    "file, a list of strings, or token tensors), or use method='svd', which needs none"
                )
            return None
        tokenizer = tokenizer or config.tokenizer or getattr(model, "name_or_path", None) or None
        held_out = config.rank_training.held_out if self._learns else 0
        return load_windows(
            config.dataset,
            tokenizer,
            nsamples=config.nsamples,
            seqlen=config.seqlen,
            seed=config.seed,
            held_out=held_out,
        )

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
    ) -> Plan:
        """The ranks of `start` moved to where the loss wants them; sets `training_curve`."""
        method = self.config.resolved_method()
        modules, self.training_curve = learn_ranks(
            model,
            layout,
            start.modules,
            open_budget(layout.targets, self.config.ratio, **budget_options(self.config, layout)),
            mode=allocation_named(method.allocation).learns or "fixed_basis",
            row=factorization_named(method.factorization),
            spectra=store.spectra(method.metric) if store is not None else None,
            store=store,
            windows=windows,
            held_out=held_out,
            settings=self.config.rank_training,
            device=self._device(layout),
            journal=self._journal(start, windows, held_out),
        )
        return replace(start, modules=modules)

    def _journal(self, start: Plan, windows: CalibrationWindows, held_out: CalibrationWindows) -> Path | None:
        """Where a training notes its state: beside the statistics, under the name of all that decides it."""
        if self.config.statistics is None:
            return None
        decides = [
            start.to_dict(),
            asdict(self.config.resolved_method()),
            self.config.to_dict(),
            windows.sha256(),
            held_out.sha256(),
        ]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.config.statistics) / f"training-{digest}.json"

    def _statistics(self, model: Any, layout: Layout, windows: CalibrationWindows | None) -> StatisticsStore | None:
        if windows is None:
            return None
        identity = fingerprint(model, windows)
        store = StatisticsStore(identity, list(layout.blocks), self.config.statistics)
        if store.is_complete:
            store.require({block: layout.linears_of(block) for block in layout.blocks})
        else:
            collector = InputCollector(layout.linears_of, store.put, lambda block: not store.has(block))
            self._runner(model, layout, windows).run(collector)
        if self.config.resolved_method().needs_gradients:
            self._collect_gradients(model, layout, windows, store)
        return store

    def _collect_gradients(
        self, model: Any, layout: Layout, windows: CalibrationWindows, store: StatisticsStore
    ) -> None:
        """Add the gradient statistics that the store lacks, over the first windows."""
        chosen = windows.first(self.config.gradient_windows)
        settings = {
            "tokens": int(chosen.attention_mask.sum()),
            "windows": chosen.sha256(),
            "fisher": self.config.fisher,
        }
        if self.config.fisher == "sampled":
            settings["seed"] = self.config.seed
        store.open_gradients(settings)
        collector = GradientCollector(
            layout.linears_of, store.put_gradients, lambda block: not store.has_gradients(block)
        )
        loss = NextTokenLoss(self.config.fisher, self.config.seed)
        runner = BackwardRunner(
            model, layout.blocks, chosen, batch_size=self.config.batch_size, device=self.config.device
        )
        runner.run_backward(collector, loss)

    def _runner(self, model: Any, layout: Layout, windows: CalibrationWindows) -> BlockRunner:
        return BlockRunner(model, layout.blocks, windows, batch_size=self.config.batch_size, device=self.config.device)

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
        row = factorization_named(self.config.resolved_method().factorization)
        device = self._device(layout)

        with Replacement(model, layout, len(ranks), device, undo_on_error) as replacement:
            if row.per_sample and windows is not None:

                def finished(block: str, factors: dict[str, Factors]) -> None:
                    for name, found in factors.items():
                        replacement.put(name, found, PreparedInputs(row, store, block, device).gram(name))

                visitor = SampleBasisVisitor(layout.linears_of, ranks, finished)
                self._runner(model, layout, windows).run(visitor, "second pass")
            else:
                for name, found, gram in decompositions(layout, row, store, device, ranks):
                    replacement.put(name, found.truncate(ranks[name]), gram)
        return {name: replacement.errors.get(name, 0.0) for name in plan.modules}


def check_model(model: Any, config: DobiSVDConfig) -> Layout:
    """Everything about a dense model that can be refused before calibration; returns its layout.

    Raises:
        ValueError: already compressed; no eligible linear; coverage; patterns or overrides that match nothing; NaN or
            infinite weights (names the module).
    """
    if is_low_rank(model):
        raise ValueError("the model is compressed already; load the dense model to compress it differently")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "the model has adapters (PEFT); merge them (merge_and_unload) or take them off before compressing"
        )
    method = config.resolved_method()
    if (method.needs_gradients or method.learns) and not _has_head(model):
        raise ValueError(
            f"{type(model).__name__} gives no next-token logits, and method {config.method!r} weighs matrices by the "
            "next-token loss: load it as a causal language model, or choose a method that reads no gradients "
            "(svd_llm_v2)"
        )
    layout = find_layout(model, config.modules_to_not_convert, config.min_coverage)
    resolve_overrides(config.overrides, list(layout.linears))
    for name, module in layout.linears.items():
        weight = weight_matrix(module)
        if weight.device.type != "meta" and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{name}.weight has NaN or infinite values; the checkpoint is damaged, or its dtype too small"
            )
    if method.needs_gradients and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} was loaded under torch.inference_mode, so no gradient can be taken through it, "
            f"and method {config.method!r} needs some: load it outside, or choose a method that reads no gradients"
        )
    if layout.left_dense:
        logger.info("left dense: %s", layout.describe_left_dense())
    return layout


def _has_head(model: Any) -> bool:
    """Whether the model has a language model's head, as far as it says."""
    head_of = getattr(model, "get_output_embeddings", None)
    return head_of is None or head_of() is not None


def make_plan(
    config: DobiSVDConfig, layout: Layout, store: StatisticsStore | None, device: torch.device | None = None
) -> Plan:
    """Ranks for every target within the byte budget, by the method's allocation."""
    method = config.resolved_method()
    allocation = allocation_named(method.allocation)
    spectra: Mapping[str, Tensor] | None = None
    if allocation.needs_spectra:
        spectra = compute_spectra(layout, factorization_named(method.metric), store, device)
    options = budget_options(config, layout)
    modules = allocation.function(layout.targets, config.ratio, **options, spectra=spectra)
    return Plan(modules=modules, method=config.method, ratio=config.ratio, allocation=method.allocation)


def predicted_increase(plan: Plan, store: StatisticsStore | None, factorization: str) -> float | None:
    """What the prices say the loss gains, in nats per token; None for factors whose prices are no such thing."""
    spectra = store.spectra("kfac") if store is not None and factorization == "kfac" else None
    if spectra is None or not plan.modules.keys() <= spectra.keys():
        return None
    ranks = {name: module.rank for name, module in plan.modules.items() if module.rank is not None}
    return sum(float(spectra[name][rank:].double().square().sum()) for name, rank in ranks.items())


def budget_options(config: DobiSVDConfig, layout: Layout) -> dict[str, Any]:
    """The keyword arguments of `open_budget`."""
    return {
        "storage": config.resolved_method().storage,
        "overrides": resolve_overrides(config.overrides, list(layout.linears)),
        "rank_multiple": config.rank_multiple,
        "min_rank": config.min_rank,
    }


def describe_dataset(windows: CalibrationWindows | None) -> str | None:
    """The calibration text in words, for config.json and the report."""
    return str(windows.description.get("dataset")) if windows is not None else None


def load_quantized_model(save_dir: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a compressed model; `AutoModelForCausalLM.from_pretrained(save_dir, **kwargs)` does the same."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(save_dir, **kwargs)
