"""What can be refused before the first pass over a model, and the job that is left."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..allocation.budget import Budget, BudgetRequest, open_budget
from ..allocation.plan import Plan
from ..calibration.dataset import CalibrationWindows
from ..calibration.loss import require_labels
from ..calibration.model_inputs import SampleIds, inputs_of
from ..calibration.objective import WITHOUT_GRADIENTS, require_next_token_model, require_own_loss
from ..calibration.processor_batches import first_processor_batch
from ..config import DobiSVDConfig
from ..encodings.base import Encoding
from ..model.device import require_device
from ..model.experts import fuse, linearize
from ..model.layout import Layout, find_layout
from ..model.linears import require_finite
from ..model.patterns import resolve_overrides
from ..model.trial import is_encoder_decoder, model_inputs, other_inputs, takes_text, text_window, try_out
from ..model.wrapped import refuse_wrapped
from ..structures.base import is_compressed
from .job import Job
from .windows import calibration_windows, check_windows, quantization_windows, tokenizer_of, with_seqlen

logger = logging.getLogger(__name__)


def prepare(
    model: Any, config: DobiSVDConfig, tokenizer: Any = None, windows: CalibrationWindows | None = None
) -> Job:
    """Check all that can be refused before weights are read, and draw the calibration windows.

    The dense model may be on meta; it is left as it is. Windows that were drawn before have those to hold out among
    them.

    Raises:
        ImportError: a library that the quantization needs is missing; names the extra.
        ValueError: a model, dataset, plan or setting that cannot work.
    """
    linearize(model)
    try:
        return _prepared(model, config, tokenizer, windows)
    finally:
        fuse(model)


def _prepared(model: Any, config: DobiSVDConfig, tokenizer: Any, windows: CalibrationWindows | None) -> Job:
    layout = check_model(model, config)
    check_encoding(config.encoding, layout, config.min_coverage)
    if config.device is not None:
        require_device(config.device)
    config = with_seqlen(config, model)
    plan = given_plan(config, layout)
    job = Job(config, layout, None if plan is not None else budget_of(config, layout), plan)
    named = tokenizer_of(model, config, tokenizer)
    learns = plan is None and job.method.learns
    if windows is None:
        windows = calibration_windows(model, config, named, config.rank_training.held_out if learns else 0)
    else:
        check_windows(model, windows)
    held_out = None
    if windows is not None and learns:
        windows, held_out = windows.split(config.rank_training.held_out)
    if windows is not None and job.method.needs_gradients:
        require_labels(windows.first(config.gradient_windows).attention_mask, "the windows of the gradients")
    if windows is not None and held_out is not None:
        require_labels(windows.attention_mask, "the windows that ranks are learned on")
        require_labels(held_out.attention_mask, "the held-out windows")
    rounded_on = quantization_windows(config.encoding, windows, config, named)
    if rounded_on is not None and rounded_on is not windows:
        check_windows(model, rounded_on)
    return replace(job, windows=windows, held_out=held_out, quantization_windows=rounded_on)


def check_model(model: Any, config: DobiSVDConfig) -> Layout:
    """Check everything about a dense model, its experts linearized, that can be refused; returns its layout.

    Raises:
        ValueError: already compressed; no eligible linear; coverage; patterns or overrides that match nothing; NaN or
            infinite weights (names the module).
    """
    refuse_wrapped(model)
    if is_compressed(model):
        raise ValueError("the model is compressed already; load the dense model to compress it differently")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "the model has adapters (PEFT); merge them (merge_and_unload) or take them off before compressing"
        )
    method = config.resolved_method()
    has_no_head = getattr(model, "get_output_embeddings", lambda: True)() is None
    if (method.needs_gradients or method.learns) and has_no_head:
        raise ValueError(
            f"{type(model).__name__} gives no next-token logits, and method {config.method!r} weighs matrices by the "
            f"next-token loss: {WITHOUT_GRADIENTS}"
        )
    layout = layout_of(model, config)
    resolve_overrides(config.overrides, list(layout.linears))
    check_weights(model, config, layout)
    if layout.left_dense:
        logger.info("left dense: %s", layout.describe_left_dense())
    return layout


def layout_of(model: Any, config: DobiSVDConfig) -> Layout:
    """Return the layout that a config asks for. ValueError as `find_layout` and `check_inputs`."""
    return find_layout(
        model,
        config.modules_to_not_convert,
        config.min_coverage,
        batch=check_inputs(model, config),
        nontext=config.nontext_modules,
    )


def check_inputs(model: Any, config: DobiSVDConfig) -> Mapping[str, Any] | None:
    """Return a row of a processor's batch if the dataset has some, and ValueError if the model takes no other data."""
    batch = first_processor_batch(config.dataset)
    reads = config.dataset is not None or config.resolved_method().needs_data
    if batch is not None and config.plan is None and config.resolved_method().learns:
        raise ValueError(
            f"method {config.method!r} learns ranks on text alone, and the calibration dataset is batches of a "
            "processor: take method 'global', which learns nothing, or calibrate on text"
        )
    if batch is not None:
        return dict(inputs_of(model, SampleIds.of(batch), torch.ones(1, 1, dtype=torch.bool)))
    others = " and ".join(other_inputs(model))
    wanted = model_inputs(model) if not takes_text(model) else others or "input_ids"
    how = f"pass dataset= as a list of batches of its processor (mappings of tensors, {wanted} among them)"
    if reads and (not takes_text(model) or (others and _needs_more_than_text(model))):
        raise ValueError(
            f"{type(model).__name__} cannot be calibrated on text: it takes {wanted}; {how}, or take "
            "method 'svd', which reads no data"
        )
    if reads and config.nontext_modules:
        raise ValueError(
            f"nontext_modules compresses what text does not pass through, and the calibration dataset is text: {how}, "
            "or leave nontext_modules out"
        )
    return None


def _needs_more_than_text(model: Any) -> bool:
    """Return whether a window of token ids alone makes an error. What has no weights yet is not asked."""
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    return not on_meta and try_out(model, text_window(model)) is None


def check_weights(model: Any, config: DobiSVDConfig, layout: Layout) -> None:
    """Raise ValueError for weights that cannot be worked with; those on meta are not looked at."""
    for name, parameter in model.named_parameters():
        require_finite(name, parameter)
    if config.resolved_method().needs_gradients and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} was loaded under torch.inference_mode, so no gradient can be taken through it, "
            f"and method {config.method!r} needs some: load it outside, or choose a method that reads no gradients"
        )


def check_loss(model: Any, job: Job) -> None:
    """Raise ValueError if the job reads the next-token loss, and this dense model's loss is another."""
    method, windows = job.method, job.windows
    if windows is None or not (method.needs_gradients or job.held_out is not None):
        return
    verb = "learns ranks on" if job.held_out is not None else "weighs matrices by"
    why = f"method {job.config.method!r} {verb} the next-token loss"
    ids, mask = next(iter(windows.batches(1)))
    if isinstance(ids, SampleIds) or is_encoder_decoder(model):
        require_own_loss(model, ids, mask, why=why, remedy=WITHOUT_GRADIENTS)
    else:
        require_next_token_model(model, windows.input_ids, windows.attention_mask, why=why, remedy=WITHOUT_GRADIENTS)


def budget_of(config: DobiSVDConfig, layout: Layout) -> Budget:
    """Return the bytes there are for every target, by the config.

    Raises:
        ValueError: overrides that cannot be honored, or a ratio or budget that is too small.
    """
    if config.budget is not None and int(config.budget) <= layout.other_bytes:
        raise ValueError(
            f"budget {config.budget} bytes: what is not compressed (embeddings, norms, excluded layers) takes "
            f"{layout.other_bytes} already; raise it"
        )
    format, *alternatives = config.formats
    request = BudgetRequest(
        format,
        config.ratio,
        size=None if config.budget is None else int(config.budget) - layout.other_bytes,
        alternatives=tuple(alternatives),
        overrides=resolve_overrides(config.overrides, list(layout.linears)),
        rank_multiple=config.rank_multiple,
        min_rank=config.min_rank,
    )
    return open_budget(layout.targets, request)


def given_plan(config: DobiSVDConfig, layout: Layout) -> Plan | None:
    """Return the plan that the config gives, checked; None if it gives none.

    Raises:
        ValueError: it does not fit the model, names encodings that the config's `quantization` does not make, or
            directions that its factors do not have.
    """
    if config.plan is None:
        return None
    plan = config.plan if isinstance(config.plan, Plan) else Plan.load(config.plan)
    plan.check(layout.targets)
    where = "the plan" if isinstance(config.plan, Plan) else str(config.plan)
    made = config.encoding
    for name, module in plan.modules.items():
        encoding = module.format.encoding
        if encoding.quant_method != config.quant_method and encoding.name not in (made.name, *made.alternatives):
            makes = "there is none" if config.quantization is None else f"quantization makes {made.name}"
            raise ValueError(
                f"{where} stores {name} as {module.encoding}, and {makes}: pass the quantization= that the plan was "
                "made with"
            )
    factorizer = config.resolved_method().factorizer
    if plan.names_directions_of is not None and not factorizer.in_units_of_loss:
        raise ValueError(
            f"{where} names directions of kfac for {plan.names_directions_of}, and the factors are made by "
            f"{factorizer.name!r}: pass factorization='kfac', or remove 'directions' from the plan"
        )
    return plan


def check_basis(plan: Plan | None, basis: str) -> None:
    """Raise ValueError if the plan names directions of other weights, text or gradients than those at hand."""
    if plan is not None and plan.names_directions_of is not None and plan.basis != basis:
        raise ValueError(
            f"the plan names directions (of {plan.names_directions_of}, for one) that were found on other weights, "
            f"calibration text or gradients (basis {plan.basis}, here it is {basis}): calibrate as then (same model "
            "and dtype, dataset, nsamples, seqlen, seed, gradient_nsamples and fisher; of token tensors, without the "
            "held-out rows), or remove 'directions' from the plan to keep the leading ones"
        )


def check_encoding(encoding: Encoding, layout: Layout, min_coverage: float) -> None:
    """Check what can be refused about a quantization before calibration.

    Raises:
        ImportError: its library is missing; names the extra.
        ValueError: the encoding fits less than `min_coverage` of the targets' weights.
    """
    encoding.require()
    shapes = {target.name: (target.out_features, target.in_features) for target in layout.targets}
    reasons = {name: encoding.unsupported_reason(*shape) for name, shape in shapes.items()}
    check_coverage(encoding, shapes, reasons, min_coverage)


def check_coverage(
    encoding: Encoding,
    shapes: Mapping[str, tuple[int, int]],
    reasons: Mapping[str, str | None],
    min_coverage: float,
) -> None:
    """Warn of matrices that cannot be stored so; ValueError where less than `min_coverage` of the parameters can.

    `shapes` are outputs and inputs of every matrix, `reasons` why it cannot be stored so, None if it can.
    """
    left = {name: math.prod(shapes[name]) for name, reason in reasons.items() if reason is not None}
    if not left:
        return
    total, count, first = sum(map(math.prod, shapes.values())), sum(left.values()), next(iter(left))
    message = (
        f"{len(left)} matrices ({count:,} of {total:,} parameters) cannot be stored as {encoding.name}: "
        f"{first}, {reasons[first]}"
    )
    if total - count < min_coverage * total or count == total:
        fits = any(encoding.unsupported_reason(*shapes[name]) is None for name in left)
        remedies = [
            "start from the checkpoint in 16 bits, or from convert(model)" if fits else encoding.remedy_for(shapes)
        ]
        if count < total:
            remedies.append(f"lower min_coverage ({min_coverage:g}) to have them as they are")
        raise ValueError(f"{message}; {', or '.join(remedies)}")
    logger.warning("%s; they stay in 8 or 16 bits", message)


_QUANTIZING = "only what is in memory can be quantized or stored otherwise: load the model without cpu or disk offload"
LEARNING = (
    "learning ranks rebuilds every weight in every step: load the model without offload, or use allocation='global', "
    "which needs no training"
)


def refuse_offloaded(modules: Mapping[str, nn.Module], why: str = _QUANTIZING) -> None:
    """Raise ValueError naming the first linear that Accelerate keeps out of memory between passes."""
    for name, module in modules.items():
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(f"{name} is offloaded, and {why}")
