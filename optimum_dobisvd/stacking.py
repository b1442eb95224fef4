"""Quantizing what low rank leaves: during a compression, and of a checkpoint that was saved without it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GPTQConfig

from .allocation.patterns import matching_names, resolve_overrides
from .allocation.target import Target
from .calibration.dataset import CalibrationWindows, load_windows
from .calibration.layout import Layout, find_blocks, find_layout
from .calibration.runner import BlockRunner
from .factorization.factors import Factors
from .in_turn import quantize_in_turn
from .inner import InnerConfig, inner_storage
from .nn.compressed_linear import CompressedLinear
from .nn.dense_linear import to_dense, weight_matrix
from .nn.low_rank_linear import LowRankLinear
from .nn.placement import dense_weight, replace_with
from .storage.inner_forms import InnerForm, gptq_form, inner_form_named

if TYPE_CHECKING:
    from .config import DobiSVDConfig

logger = logging.getLogger(__name__)


def check_inner(inner: InnerConfig, layout: Layout, min_coverage: float) -> None:
    """What can be refused about the quantization before calibration.

    Raises:
        ImportError: its library is missing; names the extra.
        ValueError: the form fits less than `min_coverage` of the targets' weights.
    """
    require_backend(inner)
    form = _form_of(inner)
    shapes = {target.name: (target.out_features, target.in_features) for target in layout.targets}
    _check_coverage(inner, shapes, {name: form.obstacle(*shape) for name, shape in shapes.items()}, min_coverage)


def _check_coverage(
    inner: InnerConfig, shapes: Mapping[str, tuple[int, int]], obstacles: Mapping[str, str | None], min_coverage: float
) -> None:
    """Tell how much cannot be quantized, by matrix; ValueError where what can is less than `min_coverage`, or none."""
    left = {name: math.prod(shapes[name]) for name, obstacle in obstacles.items() if obstacle is not None}
    if not left:
        return
    total, count, first = sum(map(math.prod, shapes.values())), sum(left.values()), next(iter(left))
    message = (
        f"{len(left)} matrices ({count:,} of {total:,} parameters) cannot be stored as {_form_of(inner).name}: "
        f"{first}, {obstacles[first]}"
    )
    if total - count < min_coverage * total or count == total:
        remedies = [_fitting(inner, shapes, obstacles)]
        if count < total:
            remedies.append(f"lower min_coverage ({min_coverage:g}) to have them as they are")
        raise ValueError(f"{message}; {', or '.join(remedies)}")
    logger.warning("%s; they stay in 8 or 16 bits", message)


def _fitting(inner: InnerConfig, shapes: Mapping[str, tuple[int, int]], obstacles: Mapping[str, str | None]) -> str:
    """What would make the matrices fit, in words."""
    form = _form_of(inner)
    if any(obstacle is not None and form.obstacle(*shapes[name]) is None for name, obstacle in obstacles.items()):
        return "start from the checkpoint in 16 bits, or from store_as(model, 'plain')"
    if not isinstance(inner, GPTQConfig):
        return "take another form: this one is not for matrices of such sizes"
    for group_size in (128, 64, 32):
        if all(gptq_form(inner.bits, group_size).obstacle(*shape) is None for shape in shapes.values()):
            return f"take group_size={group_size} (on the command line gptq{inner.bits}_g{group_size})"
    return "take another group_size"


def refuse_offloaded(modules: Mapping[str, nn.Module]) -> None:
    """ValueError naming the first linear or shell that Accelerate keeps out of memory between passes."""
    for name, module in modules.items():
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"{name} is offloaded, and GPTQ and bitsandbytes quantize only what is in memory: load the model "
                "without cpu or disk offload to quantize it"
            )


def require_backend(inner: InnerConfig) -> None:
    """ImportError, naming the extra, if the library that does it is not there; ValueError for a backend it lacks."""
    if isinstance(inner, GPTQConfig):
        from .integrations.gptq_linear import require_gptqmodel

        require_gptqmodel(inner.backend)
    else:
        from .integrations.bnb_linear import require_bitsandbytes

        require_bitsandbytes()


def inner_windows(
    inner: InnerConfig, windows: CalibrationWindows | None, dataset: Any, tokenizer: Any, **draw: int
) -> CalibrationWindows | None:
    """What rounding is calibrated on: text of GPTQ's own if its config names some, else that of the compression.

    Args:
        inner: the quantization; only GPTQ cannot do without.
        windows: those of the compression; None where there was none in this process. Then bitsandbytes does without:
            nobody expects a calibration of it when a checkpoint is loaded.
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
    """Quantize the linears inside every shell of the model that is marked with a form of `inner`.

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
    from .integrations.bnb_linear import mark_loaded, restore_biases
    from .integrations.inner_bnb import BnbRounder, quantize_bnb

    if runner is not None and inner.load_in_4bit:
        quantize_in_turn(model, runner, BnbRounder(inner), sequential=False)
    else:
        if inner.load_in_4bit:
            logger.warning(
                "no calibration text is read, so each value is rounded to 4 bits on its own, which loses much more: "
                "name some with dataset= of the DobiSVDConfig; a checkpoint that is there already is rounded with "
                "text by `optimum-cli dobisvd quantize OUT --inner nf4 --dataset TEXT`"
            )
        quantize_bnb(model, inner)
    mark_loaded(model, inner)
    restore_biases(model)


def mark_for_inner(model: Any, inner: InnerConfig, config: DobiSVDConfig) -> dict[str, dict[str, Any]]:
    """Give every plain factor and every dense target of a compressed model the form of `inner`, unquantized yet.

    Ranks that the form cannot take are filled up with zeros, which changes nothing the model computes; where that
    makes the factors as large as the matrix, it is taken whole. What cannot have the form at all is told about and
    left as it is.

    Args:
        model: compressed, in memory.
        inner: the quantization.
        config: the model's, which says what was to stay dense, and the smallest share of the rest that is accepted.

    Returns:
        `modules` of config.json, as they will be.

    Raises:
        ValueError: some are offloaded; the form fits too few. Then nothing was changed.
    """
    shells = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    dense = [target.name for target in dense_targets(model, config)]
    refuse_offloaded({**shells, **{name: model.get_submodule(name) for name in dense}})
    form = _form_of(inner)
    shapes = {name: (shell.out_features, shell.in_features) for name, shell in shells.items()}
    obstacles = {
        name: form.obstacle(*shapes[name]) if isinstance(shell, LowRankLinear) else f"it is stored as {shell.storage}"
        for name, shell in shells.items()
    }
    for name in dense:
        m, n = weight_matrix(model.get_submodule(name)).shape
        shapes[name], obstacles[name] = (m, n), form.obstacle(m, n)
    _check_coverage(inner, shapes, obstacles, config.min_coverage)
    modules = {name: {"rank": shell.rank, "storage": shell.storage} for name, shell in shells.items()}
    for name, shape in shapes.items():
        if obstacles[name] is not None:
            continue
        rank = None
        if name in shells:
            rank = _filled_up(model, name, form, *shape)
        if rank is None:
            weight = dense_weight(model.get_submodule(name))
            replace_with(model, name, form.name, None, {"whole.weight": weight})
        modules[name] = {"rank": rank, "storage": form.name}
    return modules


def _form_of(inner: InnerConfig) -> InnerForm:
    form = inner_form_named(inner_storage(inner))
    if form is None:
        raise ValueError(f"{inner_storage(inner)!r} is no form that a linear can be stored in")
    return form


def dense_targets(model: Any, config: DobiSVDConfig) -> list[Target]:
    """The linears of the blocks that a compression left as they were, but for those that were to stay so."""
    if not find_blocks(model):
        return []  # nothing but linears in 8 bits
    shells = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, CompressedLinear))
    targets = [target for target in find_layout(model).targets if not target.name.startswith(shells)]
    # A model may have been loaded without its head, and its linears then lack the first part of their names.
    prefix = getattr(model, "base_model_prefix", "")
    return [
        target
        for target in targets
        if not any(_was_to_stay(name, config) for name in (target.name, f"{prefix}.{target.name}"))
    ]


def _was_to_stay(name: str, config: DobiSVDConfig) -> bool:
    """Whether the user wanted this linear dense. Patterns may be for what is compressed, so they need not match."""
    if any(matching_names(pattern, [name]) for pattern in config.modules_to_not_convert):
        return True
    fitting = {pattern: entry for pattern, entry in config.overrides.items() if matching_names(pattern, [name])}
    override = resolve_overrides(fitting, [name]).get(name)
    return override is not None and override.dense is True


def _filled_up(model: Any, name: str, form: InnerForm, out_features: int, in_features: int) -> int | None:
    """Give the factors called `name` a rank that the form takes; returns it.

    Where factors of that rank are no smaller than the matrix, a dense linear of the same function takes their place,
    and it is None.
    """
    module = model.get_submodule(name)
    rank = -(-module.rank // form.rank_multiple) * form.rank_multiple
    size = module.weight.element_size()
    factors = form.bytes_of(rank, in_features, size) + form.bytes_of(out_features, rank, size)
    if rank > min(out_features, in_features) or factors >= form.bytes_of(out_features, in_features, size):
        model.set_submodule(name, to_dense(module).train(module.training))
        return None
    new = _of_rank(module, rank)
    new.storage = form.name
    model.set_submodule(name, new)
    return rank


def _of_rank(module: LowRankLinear, rank: int) -> LowRankLinear:
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
