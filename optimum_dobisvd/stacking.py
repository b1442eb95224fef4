"""Quantising what low rank leaves: during a compression, and of a checkpoint that was saved without it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import GPTQConfig

from .allocation.patterns import select
from .allocation.target import Target
from .calibration.dataset import CalibrationWindows, load_windows
from .calibration.layout import Layout, find_blocks, find_layout
from .calibration.runner import BlockRunner
from .factorization.factors import Factors
from .in_turn import quantize_in_turn
from .inner import InnerConfig, inner_storage
from .nn.compressed_linear import CompressedLinear
from .nn.low_rank_linear import LowRankLinear
from .nn.placement import dense_weight, replace_with
from .storage.inner_forms import InnerForm, inner_form_named

logger = logging.getLogger(__name__)


def check_inner(inner: InnerConfig, layout: Layout, min_coverage: float) -> None:
    """What can be refused about the quantisation before calibration.

    Raises:
        ImportError: its library is missing; names the extra.
        ValueError: the form fits less than `min_coverage` of the targets' weights.
    """
    require_backend(inner)
    form = _form_of(inner)
    obstacles = {target.name: form.obstacle(target.out_features, target.in_features) for target in layout.targets}
    left = {target.name: target for target in layout.targets if obstacles[target.name] is not None}
    if not left:
        return
    count = sum(target.out_features * target.in_features for target in left.values())
    share = 1 - count / sum(target.out_features * target.in_features for target in layout.targets)
    first = next(iter(left))
    message = (
        f"{len(left)} matrices ({count:,} parameters) cannot be stored as {form.name}: {first}, {obstacles[first]}"
    )
    if share < min_coverage:
        raise ValueError(
            f"{message}; take another group_size (one that divides their inputs), or lower min_coverage "
            f"({min_coverage:g}) to have them in 8 or 16 bits"
        )
    logger.warning("%s; they stay in 8 or 16 bits", message)


def refuse_offloaded(modules: Mapping[str, nn.Module]) -> None:
    """ValueError naming the first linear or shell that Accelerate keeps out of memory between passes."""
    for name, module in modules.items():
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"{name} is offloaded, and GPTQ and bitsandbytes quantise only what is in memory: load the model "
                "without cpu or disk offload to quantise it"
            )


def require_backend(inner: InnerConfig) -> None:
    """ImportError, naming the extra, if the library that does it is not there."""
    if isinstance(inner, GPTQConfig):
        from .integrations.gptq_linear import require_gptqmodel

        require_gptqmodel()
    else:
        from .integrations.bnb_linear import require_bitsandbytes

        require_bitsandbytes()


def inner_windows(
    inner: InnerConfig, windows: CalibrationWindows | None, dataset: Any, tokenizer: Any, **draw: int
) -> CalibrationWindows | None:
    """What rounding is calibrated on: text of GPTQ's own if its config names some, else that of the compression.

    Args:
        inner: the quantisation; only GPTQ cannot do without.
        windows: those of the compression; None where there was none in this process.
        dataset: what to draw from without them.
        tokenizer: where the GPTQ config gives none.
        draw: `nsamples`, `seqlen` and `seed`.

    Raises:
        ValueError: there is no text.
    """
    if not isinstance(inner, GPTQConfig):
        return windows
    own = inner.dataset
    if own is None and windows is not None:
        return windows
    text = {"c4-new": "c4"}.get(own, own) if isinstance(own, str) else own if own is not None else dataset
    if text is None:
        raise ValueError(f"GPTQ needs calibration text: {_HOW_TO_GIVE_TEXT}")
    try:
        return load_windows(text, inner.tokenizer or tokenizer, **draw)
    except (ValueError, OSError) as error:
        raise ValueError(f"GPTQ needs calibration text: {error}; {_HOW_TO_GIVE_TEXT}") from error


_HOW_TO_GIVE_TEXT = "pass GPTQConfig(dataset=[...texts]), or dataset= of the DobiSVDConfig"


def quantize_shells(
    model: Any,
    blocks: Mapping[str, nn.Module],
    inner: InnerConfig,
    windows: CalibrationWindows | None,
    *,
    batch_size: int,
    device: Any = None,
) -> None:
    """Quantise the linears inside every shell of the model that is marked with a form of `inner`.

    Args:
        model: compressed; its shells hold plain linears still.
        blocks: its blocks, by name.
        inner: how.
        windows: what the rounding is calibrated on. GPTQ needs some; without them bitsandbytes' 4 bits are each
            rounded on their own, and 8 bits always are.
        batch_size, device: of that calibration.
    """
    runner = None
    if windows is not None:
        runner = BlockRunner(model, dict(blocks), windows, batch_size=batch_size, device=device)
    if isinstance(inner, GPTQConfig):
        from .integrations.inner_gptq import GPTQRounder, quiet_gptqmodel

        if runner is None:
            raise ValueError(f"GPTQ needs calibration text: {_HOW_TO_GIVE_TEXT}")
        with quiet_gptqmodel():
            quantize_in_turn(model, runner, GPTQRounder(inner), sequential=inner.true_sequential)
        return
    from .integrations.bnb_linear import mark_loaded
    from .integrations.inner_bnb import BnbRounder, quantize_bnb

    if runner is not None and inner.load_in_4bit:
        quantize_in_turn(model, runner, BnbRounder(inner), sequential=False)
    else:
        if inner.load_in_4bit:
            logger.warning(
                "there is no calibration text, so each value is rounded to 4 bits on its own, which loses much "
                "more: name some with dataset= of the DobiSVDConfig (on the command line --dataset)"
            )
        quantize_bnb(model, inner)
    mark_loaded(model, inner)


def mark_for_inner(model: Any, inner: InnerConfig, modules_to_not_convert: list[str]) -> dict[str, dict[str, Any]]:
    """Give every plain factor and every dense target of a compressed model the form of `inner`, unquantised yet.

    Ranks that the form cannot take are filled up with zeros, which changes nothing the model computes. What cannot
    have the form at all is told about and left as it is.

    Returns `modules` of config.json, as they will be. Raises ValueError if some are offloaded.
    """
    refuse_offloaded({name: shell for name, shell in model.named_modules() if isinstance(shell, CompressedLinear)})
    form = _form_of(inner)
    storage = form.name
    modules: dict[str, dict[str, Any]] = {}
    left = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, CompressedLinear):
            continue
        modules[name] = {"rank": module.rank, "storage": module.storage}
        shape = (module.out_features, module.in_features)
        if not isinstance(module, LowRankLinear) or form.obstacle(*shape) is not None:
            left += module.out_features * module.in_features
            continue
        rank = -(-module.rank // form.rank_multiple) * form.rank_multiple
        new = _filled_up(module, rank)
        new.storage = storage
        model.set_submodule(name, new)
        modules[name] = {"rank": rank, "storage": storage}
    for target in dense_targets(model, modules_to_not_convert):
        if form.obstacle(target.out_features, target.in_features) is not None:
            left += target.out_features * target.in_features
            continue
        weight = dense_weight(model.get_submodule(target.name))
        replace_with(model, target.name, storage, None, {"whole.weight": weight})
        modules[target.name] = {"rank": None, "storage": storage}
    if left:
        logger.warning("%s parameters cannot be stored as %s and stay as they are", f"{left:,}", storage)
    return modules


def _form_of(inner: InnerConfig) -> InnerForm:
    form = inner_form_named(inner_storage(inner))
    if form is None:
        raise ValueError(f"{inner_storage(inner)!r} is no form that a linear can be stored in")
    return form


def dense_targets(model: Any, modules_to_not_convert: list[str]) -> list[Target]:
    """The linears of the blocks that a compression left as they were and nobody excluded."""
    if not find_blocks(model):
        return []  # nothing but linears in 8 bits
    shells = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, CompressedLinear))
    targets = [target for target in find_layout(model).targets if not target.name.startswith(shells)]
    excluded = select(modules_to_not_convert, [target.name for target in targets])
    return [target for target in targets if target.name not in excluded]


def _filled_up(module: LowRankLinear, rank: int) -> LowRankLinear:
    """The same function at a higher rank, with zeros in both factors, and the ranks mixed."""
    new = LowRankLinear(
        module.in_features,
        module.out_features,
        rank,
        bias=module.bias is not None,
        conv1d=module.conv1d,
        device="meta",
        dtype=module.weight.dtype,
    )
    new.weight = module.weight
    first, second = module.first.weight.detach().double(), module.second.weight.detach().double()
    missing = rank - module.rank
    filled = Factors(nn.functional.pad(second, (0, missing)), nn.functional.pad(first, (0, 0, 0, missing))).mixed()
    new.first.weight = nn.Parameter(filled.first.to(module.weight.dtype))
    new.second.weight = nn.Parameter(filled.second.to(module.weight.dtype))
    if module.bias is not None:
        new.second.bias = module.second.bias
    return new.train(module.training)
