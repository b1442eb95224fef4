"""Learning the codes of a compressed model's linears, block by block, towards the outputs of the dense blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..calibration.paired import BlockPasses, PairedRunner
from ..encodings.base import Encoding
from ..encodings.learned_rounding import LearnableLinear, LearnedRoundingSettings, SignedDescent
from ..structures.base import CompressedLinear
from .dense_beside import dense_again
from .rest_of_blocks import RestOfBlocks

_BATCHES_OF_MOMENTS = 2
"""From which the mean squares of inputs are taken."""


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
        moments = _input_moments(here, passes)
        learnable = {
            name: _make_learnable(each, encodings[each.encoding], dtypes[name]) for name, each in here.items()
        }
        every = {f"{name}.{child}": each for name, made in learnable.items() for child, each in made.items()}
        for name, each in every.items():
            if name in moments:  # else it was given no token
                each.fit_ranges(moments[name])
        descent = SignedDescent(every.values(), settings, () if rest is None else rest.of(block, module))
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
def _input_moments(here: Mapping[str, CompressedLinear], passes: BlockPasses) -> dict[str, torch.Tensor]:
    """Return the mean square of every input of the linears that these are written as, by name, still unrounded."""
    names = [f"{name}.{child}" for name, module in here.items() for child, _ in module.named_children()]
    sums: dict[str, torch.Tensor] = {}
    for batch in range(min(_BATCHES_OF_MOMENTS, len(passes.targets))):
        for name, rows in passes.inputs(batch, names).items():
            sums[name] = sums.get(name, 0) + rows.square().sum(0)
    return {name: total / total.mean().clamp_min(1e-30) for name, total in sums.items()}


def _make_learnable(module: CompressedLinear, encoding: Encoding, dtype: torch.dtype) -> dict[str, LearnableLinear]:
    """Put learnable linears in the places of a compressed linear's children."""
    made: dict[str, LearnableLinear] = {}
    for child, linear in list(module.named_children()):
        plain: Any = linear
        made[child] = encoding.learnable(plain, dtype).to(plain.weight.device)
        module.set_submodule(child, made[child])
    return made
