"""Quantizing a compressed model's linears, each on the inputs that the quantized ones before it give."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.paired import InputPairs, PairedRunner
from ..encodings.base import Encoding
from ..encodings.registry import beside
from ..factorization.parallel import in_threads, one_thread_if_small, workers_for
from ..statistics.collect import BlockStatistics, InputCollector
from ..statistics.pooling import pool_name
from ..statistics.store import full_gram
from ..structures.base import CompressedLinear, compressed_linears, restore_tensors
from ..structures.format import Format
from .dense_beside import dense_again, unrounded
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
            beside_it = (dense or unrounded(waiting)) if encoding.needs_dense else None
            in_turn = encoding.one_input_at_a_time
            quantize_sequentially(waiting, kinds, runner, one_input_at_a_time=in_turn, dense=beside_it)
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
    runner: PairedRunner,
    *,
    one_input_at_a_time: bool,
    dense: dict[str, nn.Module] | None = None,
) -> None:
    """Quantize compressed linears in place, block by block.

    Each block is calibrated on what the quantized blocks before it give. Within a block, linears that share an input
    are rounded together, and if `one_input_at_a_time` the next ones see what these give. The inputs of a structure's
    later linears follow from the quantized ones before them, exactly. The first token of every window counts as many.
    With `dense`, the linears that they stand for, they are rounded towards the outputs on what these read in the dense
    model; but for experts, which are not sent the same tokens there.

    Raises:
        ValueError: naming the linear that saw no token, or that could not be rounded.
    """
    sizes = [min(module.out_features, module.in_features) for module in waiting.values()]
    in_threads_too = all(encodings[module.encoding].quantizes_in_threads for module in waiting.values())
    device = next(iter(waiting.values())).weight.device
    workers = workers_for(max(sizes), device) if in_threads_too else 1
    routed: list[str] = []

    def change(
        block: str, _module: nn.Module, replay: Callable[[InputCollector], None], pairs: InputPairs | None = None
    ) -> None:
        here = {name: module for name, module in waiting.items() if f"{name}.".startswith(f"{block}.")}
        while here:
            inputs = _inputs_of_next(block, here, replay, pairs, one_input_at_a_time=one_input_at_a_time)
            routed.extend(name for name, key in inputs.key.items() if key not in inputs.crossed)

            def quantize_linear(name: str, inputs: _Inputs = inputs, here: Any = here) -> None:
                key = inputs.key[name]
                encoding = encodings[here[name].encoding]
                _quantize_one(name, here[name], encoding, inputs.grams[key], inputs.crossed.get(key))

            for _ in in_threads(quantize_linear, list(inputs.key), workers):
                pass
            here = {name: module for name, module in here.items() if name not in inputs.key}

    if dense is None:
        runner.run_sequentially(change, "quantizing")
        return

    def as_dense(block: str, release: bool) -> AbstractContextManager[None]:
        return dense_again(runner.model, dense, block, release=release)

    runner.run_beside(as_dense, change, "quantizing")
    if routed:
        logger.warning(
            "%d linears (%s, for one) are not given every token, as experts are not: in the dense model they may be "
            "given others, so they are rounded towards what they give unrounded on those that they are given here",
            len(routed),
            routed[0],
        )


@dataclass(frozen=True)
class _Inputs:
    """What the linears that are rounded next read: `key` names the input of each.

    By that key: `H` of it, and `X_d X^T` where they are rounded towards the dense model.
    """

    key: dict[str, str]
    grams: dict[str, Tensor]
    crossed: dict[str, Tensor]


def _inputs_of_next(
    block: str,
    here: Mapping[str, CompressedLinear],
    replay: Callable[[InputCollector], None],
    pairs: InputPairs | None,
    *,
    one_input_at_a_time: bool,
) -> _Inputs:
    """Return the inputs of the linears of a block that are rounded next, of those that are not yet: all, or some."""
    statistics = _input_statistics(here, replay)
    # In the order in which the block calls them: the first one's input is that of the quantized model, and so are
    # those of the other experts.
    stages = {
        name: pool_name(block, key) if key in statistics.routed else key for name, key in statistics.input_key.items()
    }
    first = next(iter(stages.values()))
    keys = {name: statistics.input_key[name] for name in here if not one_input_at_a_time or stages[name] == first}
    grams = {key: full_gram(statistics.inputs[key]) for key in dict.fromkeys(keys.values())}
    single = [key for key in grams if key in statistics.input_key]  # not a pool of experts
    return _Inputs(keys, grams, {} if pairs is None else _crossed(single, pairs))


def _crossed(names: Sequence[str], pairs: InputPairs) -> dict[str, Tensor]:
    """Return `X_d X^T` (`n x n`, float64) of what these linears read in the dense model and in this one.

    Tokens count as in the Grams. Linears that are not given all tokens, each once, are left out.
    """
    sums: dict[str, Tensor] = {}
    left_out: set[str] = set()
    for mask, there, here in pairs(names):
        weights = _token_weights(mask)[mask][:, None]
        for name in names:
            x, x_dense = here.get(name), there.get(name)
            if x is None or x_dense is None or not len(x) == len(x_dense) == len(weights):
                left_out.add(name)
                continue
            product = (x_dense.to(x) * weights.to(x)).T @ x
            sums[name] = sums[name].add_(product) if name in sums else product.double()
    return {name: each.cpu() for name, each in sums.items() if name not in left_out}


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


def _quantize_one(
    name: str,
    module: CompressedLinear,
    encoding: Encoding,
    gram: Tensor | None,
    crossed: Tensor | None = None,
) -> None:
    """Quantize the linears of one compressed linear in the order in which they compute."""
    plain: Any = dict(module.named_children())
    weights = {child: linear.weight.detach() for child, linear in plain.items()} | module.own()
    device = next(iter(weights.values())).device
    format, full_rank = Format(type(module), encoding), min(module.out_features, module.in_features)
    try:
        # Sums are kept on the CPU.
        felt, aimed = (None if each is None else each.to(device) for each in (gram, crossed))
        with one_thread_if_small(full_rank, device):
            done, _ = format.quantize(weights, module.bias, module.weight.dtype, full_rank, felt, aimed)
    except (ValueError, RuntimeError, torch.linalg.LinAlgError) as error:
        raise ValueError(f"{name}: rounding it to {module.encoding} failed: {error}") from error
    for child, linear in done.items():
        module.set_submodule(child, linear.train(module.training))
