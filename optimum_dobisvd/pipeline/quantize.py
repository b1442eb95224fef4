"""Quantizing a compressed model's linears, each on the inputs that the quantized ones before it give."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.paired import PairedRunner
from ..calibration.runner import BlockRunner
from ..encodings.base import Encoding
from ..encodings.registry import beside
from ..factorization.parallel import in_threads, one_thread_if_small, workers_for
from ..statistics.collect import BlockStatistics, InputCollector
from ..statistics.pooling import pool_name
from ..statistics.store import full_gram
from ..structures.base import CompressedLinear, compressed_linears, restore_tensors
from ..structures.format import Format
from .learn_rounding import learn_rounding

logger = logging.getLogger(__name__)

_FIRST_TOKEN = 1 / 32
"""What a window's first token counts as, in lengths of the window.

Attention rests on the first token wherever it finds nothing to attend to (the attention sink, arXiv 2309.17453), so
what rounding does to that one token is felt at all others, and a Gram in which it is one of a thousand does not know.
Low rank has no need of this: it keeps the one large direction of that token anyway. SmolLM2 in 3 bits of GPTQ has a
perplexity of 51.0 without it and 42.0 with it (WikiText-2 validation); from a hundredth to a tenth of a window there
is little to choose.
"""


def quantize(
    model: Any, encoding: Encoding, runner: PairedRunner | None, dense: dict[str, nn.Module] | None = None
) -> None:
    """Quantize the linears in every compressed linear that is to have an encoding of this kind and has not yet.

    Args:
        model: compressed; those still hold plain linears.
        encoding: with its settings; others (GPTQ's other bits, `int8` beside it) are made with the same.
        runner: of the calibration windows, None without. Encodings that need no text round each value on its own then.
        dense: the linears that compressed ones stand for, for codes that are learned: they are let go of one by one.
            None: the compressed ones as they are.

    Raises:
        ValueError: naming the linear that saw no token, or that could not be rounded; an encoding needs text and there
            is none.
    """
    if encoding.trainable:
        return  # plain linears are what it is made of
    compressed = compressed_linears(model)
    found = {name: beside(encoding, name) for name in dict.fromkeys(each.encoding for each in compressed.values())}
    own = (encoding.name, *encoding.alternatives)
    kinds = {name: each for name, each in found.items() if name in own or each.waits}
    meant = {name: each for name, each in compressed.items() if each.encoding in kinds}
    waiting = {
        name: each for name, each in meant.items() if all(type(child) is nn.Linear for child in each.children())
    }
    if waiting and runner is None and encoding.needs_text:
        raise ValueError(f"{encoding.text_is_missing}: name some with dataset= of the DobiSVDConfig")
    with encoding.quiet() if waiting else contextlib.nullcontext():
        if waiting and runner is not None and encoding.learned is not None:
            learn_rounding(waiting, kinds, encoding.learned, runner, {} if dense is None else dense)
        elif waiting and runner is not None and encoding.uses_text:
            quantize_sequentially(waiting, kinds, runner, one_input_at_a_time=encoding.one_input_at_a_time)
        else:
            if waiting and encoding.uses_text:
                logger.warning(
                    "no calibration text is read, so each value is rounded to 4 bits on its own, which loses much "
                    "more: name some with dataset= of the DobiSVDConfig; a checkpoint that is there already is "
                    "rounded with text by `optimum-cli dobisvd quantize OUT --quantization nf4 --dataset TEXT`"
                )
            for name, module in waiting.items():
                _quantize_one(name, module, kinds[module.encoding], None)
    if any(each.encoding in own for each in meant.values()):
        encoding.loaded_model(model)
    restore_tensors(meant, kinds)


def quantize_sequentially(
    waiting: dict[str, CompressedLinear],
    encodings: Mapping[str, Encoding],
    runner: BlockRunner,
    *,
    one_input_at_a_time: bool,
) -> None:
    """Quantize compressed linears in place, block by block.

    Each block is calibrated on what the quantized blocks before it give. Within a block, linears that share an input
    are rounded together, and if `one_input_at_a_time` the next ones see what these give. The inputs of a structure's
    later linears follow from the quantized ones before them, exactly. The first token of every window counts as many.

    Raises:
        ValueError: naming the linear that saw no token, or that could not be rounded.
    """
    sizes = [min(module.out_features, module.in_features) for module in waiting.values()]
    in_threads_too = all(encodings[module.encoding].quantizes_in_threads for module in waiting.values())
    device = next(iter(waiting.values())).weight.device
    workers = workers_for(max(sizes), device) if in_threads_too else 1

    def quantize_linear(
        here: Mapping[str, CompressedLinear], grams: Mapping[str, Tensor], input_of: Mapping[str, str], name: str
    ) -> None:
        _quantize_one(name, here[name], encodings[here[name].encoding], grams[input_of[name]])

    def change(block: str, _module: nn.Module, replay: Callable[[InputCollector], None]) -> None:
        here = {name: module for name, module in waiting.items() if f"{name}.".startswith(f"{block}.")}
        while here:
            statistics = _input_statistics(here, replay)
            grams = {key: full_gram(each) for key, each in statistics.inputs.items()}
            input_of = statistics.input_key
            # In the order in which the block calls them: the first one's input is that of the quantized model, and so
            # are those of the other experts.
            stages = {
                name: pool_name(block, key) if key in statistics.routed else key for name, key in input_of.items()
            }
            first = next(iter(stages.values()))
            names = [name for name in here if not one_input_at_a_time or stages[name] == first]
            for _ in in_threads(partial(quantize_linear, here, grams, input_of), names, workers):
                pass
            here = {name: module for name, module in here.items() if name not in names}

    runner.run_sequentially(change, "quantizing")


def _input_statistics(
    modules: Mapping[str, CompressedLinear], replay: Callable[[InputCollector], None]
) -> BlockStatistics:
    """Statistics of the inputs of every compressed linear."""
    found: dict[str, BlockStatistics] = {}
    entries: dict[str, nn.Module] = {name: next(module.children()) for name, module in modules.items()}
    replay(InputCollector(lambda _: entries, lambda _, each: found.update(it=each), lambda _: True, _token_weights))
    return found["it"]


def _token_weights(mask: Tensor) -> Tensor:
    """How many tokens each one of a batch counts as (`batch x seqlen`), from which of them are no padding."""
    weights = torch.ones(mask.shape, device=mask.device)
    first = mask.long().argmax(1, keepdim=True)
    return weights.scatter(1, first, (mask.sum(1, keepdim=True) * _FIRST_TOKEN).clamp_min(1))


def _quantize_one(name: str, module: CompressedLinear, encoding: Encoding, gram: Tensor | None) -> None:
    """Quantize the linears of one compressed linear in the order in which they compute."""
    plain: Any = dict(module.named_children())
    weights = {child: linear.weight.detach() for child, linear in plain.items()} | module.own()
    device = next(iter(weights.values())).device
    format, full_rank = Format(type(module), encoding), min(module.out_features, module.in_features)
    try:
        # Sums are kept on the CPU.
        felt = None if gram is None else gram.to(device)
        with one_thread_if_small(full_rank, device):
            done, _ = format.quantize(weights, module.bias, module.weight.dtype, full_rank, felt)
    except (ValueError, RuntimeError, torch.linalg.LinAlgError) as error:
        raise ValueError(f"{name}: rounding it to {module.encoding} failed: {error}") from error
    for child, linear in done.items():
        module.set_submodule(child, linear.train(module.training))
