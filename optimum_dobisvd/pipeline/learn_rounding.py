"""Learning the codes of a compressed model's linears, block by block, towards the outputs of the dense blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.paired import BlockPasses, PairedRunner
from ..encodings.base import Encoding
from ..encodings.learned_rounding import LearnableLinear, LearnedRoundingSettings, SignedDescent
from ..structures.base import CompressedLinear
from .dense_beside import dense_again
from .rest_of_blocks import RestOfBlocks

_BATCHES_OF_MOMENTS = 8
"""From which the mean squares of inputs, and the sums of their products, are taken."""


def check_runnable(runner: PairedRunner, encoding: Encoding) -> None:
    """Raise ValueError if the encoding cannot be rounded in the runner's model, before anything is changed in it."""
    if encoding.learned is not None and encoding.learned.rest_learning_rate is not None:
        RestOfBlocks(runner.model)
    if encoding.needs_dense:
        runner.require_separate_blocks()


def learn_rounding(
    waiting: Mapping[str, CompressedLinear],
    encodings: Mapping[str, Encoding],
    settings: LearnedRoundingSettings,
    runner: PairedRunner,
    dense: dict[str, nn.Module],
) -> None:
    """Quantize compressed linears in place: codes and grids of a block are learned together, in all its linears.

    The inputs of a block are what the quantized blocks before it give, the target is what the dense block gives on
    what the dense ones before it give, so that a block makes up for the ones before it, and for its own low rank.

    Args:
        waiting: linears that hold plain ones, by name.
        encodings: by the names that they have as `encoding`.
        settings: of the descent.
        runner: of the calibration windows.
        dense: the linears that compressed ones stand for, by name; others of a block compute as they are.
            Each is let go of when its block is done.

    Raises:
        ValueError: the model cannot be run block by block; an output is not finite (names the block).
    """
    generator = torch.Generator().manual_seed(0)
    dtypes = {name: module.weight.dtype for name, module in waiting.items()}  # passes may widen them meanwhile
    rest = RestOfBlocks(runner.model) if settings.rest_learning_rate is not None else None

    def change(block: str, module: nn.Module, passes: BlockPasses) -> None:
        here = {name: each for name, each in waiting.items() if f"{name}.".startswith(f"{block}.")}
        if not here:
            return
        moments, grams = _input_moments(here, passes)
        learnable = {
            name: make_learnable(name, each, encodings[each.encoding], dtypes[name], moments, grams.get(name))
            for name, each in here.items()
        }
        every = [each for made in learnable.values() for each in made.values()]
        descent = SignedDescent(every, settings, () if rest is None else rest.of(block, module))
        order: list[int] = []
        for _ in range(settings.steps):
            order = order or torch.randperm(len(passes.targets), generator=generator).tolist()
            batch = order.pop()
            with torch.enable_grad():
                descent.step(nn.functional.mse_loss(passes.outputs(batch).float(), passes.targets[batch].float()))
        descent.take_best()
        for name, children in learnable.items():
            for child, each in children.items():
                kernel = encodings[here[name].encoding].from_learned(each)
                here[name].set_submodule(child, kernel.train(here[name].training))

    with contextlib.nullcontext() if rest is None else rest:
        runner.run_paired(partial(dense_again, runner.model, dense, release=True), change, "learning to round")


@torch.no_grad()
def _input_moments(
    here: Mapping[str, CompressedLinear], passes: BlockPasses
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the mean square of every input of the linears that these are written as, by name, still unrounded.

    And the sums of products of the inputs, of matrices that are written as several linears.
    """
    children = {f"{name}.{child}": name for name, module in here.items() for child, _ in module.named_children()}
    zero = torch.zeros(())
    squares: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}
    for batch in range(min(_BATCHES_OF_MOMENTS, len(passes.targets))):
        for child, rows in passes.inputs(batch, list(children)).items():
            name = children[child]
            squares[child] = squares.get(child, zero) + rows.square().sum(0)
            if child == f"{name}.{here[name].input_linear}" and len(list(here[name].children())) > 1:
                grams[name] = grams.get(name, zero) + rows.T @ rows
    return {child: total / total.mean().clamp_min(1e-30) for child, total in squares.items()}, grams


@torch.no_grad()
def make_learnable(
    name: str,
    module: CompressedLinear,
    encoding: Encoding,
    dtype: torch.dtype,
    moments: Mapping[str, Tensor],
    gram: Tensor | None,
) -> dict[str, LearnableLinear]:
    """Put learnable linears in the places of a compressed linear's children.

    Each makes the best of how those before it are rounded now, where its structure does (`refitted`), on grids that
    lose least. One that was given no token begins with the range of its values, and as it is.
    """
    linears: dict[str, Any] = dict(module.named_children())
    weights = {child: linear.weight.detach().float() for child, linear in linears.items()}
    rounded: dict[str, Tensor] = {}
    made: dict[str, LearnableLinear] = {}
    for child, linear in linears.items():
        if gram is not None:
            weight = module.refitted(child, weights, rounded, gram).float()
            linear.weight = nn.Parameter(weight, requires_grad=False)
        made[child] = encoding.learnable(linear, dtype).to(linear.weight.device)
        if f"{name}.{child}" in moments:
            made[child].fit_ranges(moments[f"{name}.{child}"])
        rounded[child] = made[child].weight
        module.set_submodule(child, made[child])
    return made
