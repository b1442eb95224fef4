"""An estimate of what a compression takes: memory, disk and time, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.temporarily import computes_in_float32
from ..config import DobiSVDConfig
from ..model.footprint import macs_per_token, model_bytes
from ..model.layout import Layout
from ..model.linears import weight_matrix
from ..pipeline.job import Job
from ..statistics.packing import packed_length
from .machine import Speed

# Linears of one parent that read one tensor, by their names in the common architectures.
_SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_LIBRARIES = 500_000_000  # resident size of Python with torch and transformers imported
_SVD_COPIES = 6  # weight, product, both factors and workspace, in float64
_EIGEN_COPIES = 4  # Gram, eigenvectors, root and inverse, in float64


@dataclass(frozen=True)
class Need:
    """Bytes that a compression needs.

    Attributes:
        host: in memory, by what takes them.
        device: on the compute device, where that is another one.
        store: the statistics, in a folder if there is one and in memory otherwise.
    """

    host: dict[str, int]
    device: dict[str, int]
    store: int


def distinct_inputs(layout: Layout) -> dict[str, list[int]]:
    """`{block: sizes of the inputs of its linears}`, q/k/v and gate/up counted as one.

    An upper bound: linears of other names that share an input are counted one by one.
    """
    found: dict[str, list[int]] = {}
    for block in layout.blocks:
        seen: dict[tuple[str, Any, int], int] = {}
        for name, module in layout.linears_of(block).items():
            parent, _, last = name.rpartition(".")
            group = next((names for names in _SHARED_INPUTS if last in names), (last,))
            size = weight_matrix(module).shape[1]
            seen[parent, group, size] = size
        found[block] = list(seen.values())
    return found


def store_bytes(layout: Layout, config: DobiSVDConfig) -> int:
    """Size of the statistics: a packed float32 triangle and a mean per channel for every distinct input.

    With gradients a triangle for every linear's output, too.
    """
    inputs = sum(4 * (packed_length(size) + size) for sizes in distinct_inputs(layout).values() for size in sizes)
    if not config.resolved_method().needs_gradients:
        return inputs
    return inputs + sum(4 * packed_length(len(weight_matrix(module))) for module in layout.linears.values())


def needs_text(config: DobiSVDConfig) -> bool:
    """Whether the compression collects statistics of calibration text."""
    return config.resolved_method().needs_data


def _quantizes_on_text(config: DobiSVDConfig) -> bool:
    """Whether quantization is calibrated, block by block as statistics are collected."""
    encoding = config.encoding
    return encoding.needs_text or (encoding.uses_text and config.dataset is not None)


@dataclass(frozen=True)
class Known:
    """Results that are there already: the statistics, and the spectra that the allocation reads (or none are read)."""

    collected: bool
    scored: bool


def memory_need(model: nn.Module, job: Job, known: Known) -> Need:
    """Return the bytes at the peak of the run.

    Args:
        model: the dense model, on meta.
        job: the compression.
        known: what is there already.
    """
    config, layout = job.config, job.layout
    inputs = distinct_inputs(layout)
    widest = max(layout.blocks, key=lambda block: sum(size**2 for size in inputs[block]))
    linears = [weight_matrix(module) for module in layout.linears_of(widest).values()]
    element = linears[0].element_size()
    factorizing = 8 * _EIGEN_COPIES * sum(size**2 for size in inputs[widest])
    factorizing += 8 * _SVD_COPIES * max(weight.numel() for weight in linears)
    collecting = needs_text(config) and not known.collected
    calibrating: dict[str, int] = {}
    at_loss: dict[str, int] = {}
    host = {"Python and libraries": _LIBRARIES, "model": model_bytes(model.parameters())}
    if collecting or _quantizes_on_text(config):
        with_gradients = collecting and job.method.needs_gradients
        calibrating = _calibration_bytes(layout, config, widest, inputs[widest], with_gradients)
        at_loss = _loss_bytes(model, layout, config, linears[0].dtype) if with_gradients else {}
        host["hidden states of all windows"] = _hidden_bytes(model, layout, config, element, with_gradients)
    work = _larger(calibrating, {"one block's factorization": factorizing})
    store = store_bytes(layout, config) if needs_text(config) else 0
    if store and config.statistics is None:
        host["statistics, kept in memory"] = store
    if job.given_plan is None and job.method.learns:
        shapes = [weight_matrix(module).shape for module in layout.linears.values()]
        # Both factors of every matrix at full rank, a copy of its dense weight, and its gradient.
        host["rank training"] = sum(((m + n) * min(m, n) + 2 * m * n) * element for m, n in shapes)
        host["rank training"] += _training_activations(model, layout, config, element)
    if config.device is None or config.device == "cpu":
        return Need({**host, **_larger(work, at_loss)}, {}, store)
    block = model_bytes(layout.blocks[widest].parameters())
    # What lies around the blocks, the head among it, stays where the model is.
    return Need({**host, **at_loss}, {"one block": block, **work}, store)


def _calibration_bytes(
    layout: Layout, config: DobiSVDConfig, widest: str, gram_sizes: list[int], with_gradients: bool
) -> dict[str, int]:
    """Return the bytes needed while windows go through the widest block, by what takes them."""
    linears = [weight_matrix(module) for module in layout.linears_of(widest).values()]
    element, outputs = linears[0].element_size(), [len(weight) for weight in linears]
    widened = computes_in_float32(torch.device(config.device or "cpu"), linears[0].dtype)
    # Every linear's output and its input in float32; attention itself adds little with the fused kernels.
    activations = (
        config.batch_size * config.window_length * (sum(outputs) * (4 if widened else element) + 4 * max(gram_sizes))
    )
    grams = 8 * sum(size**2 for size in gram_sizes) + 4 * max(gram_sizes) ** 2
    if with_gradients:
        grams = max(grams, 8 * sum(size**2 for size in outputs) + 4 * max(outputs) ** 2)
        activations *= 2  # every activation and its gradient
    found = {"one block's activations": activations, "one block's Grams": grams}
    if widened:
        found["one block in float32"] = 2 * model_bytes(layout.blocks[widest].parameters())
    return found


def _hidden_bytes(model: nn.Module, layout: Layout, config: DobiSVDConfig, element: int, with_gradients: bool) -> int:
    """Hidden states at one boundary between blocks; with gradients, at all of them, of fewer windows."""
    hidden = config.nsamples * config.window_length * _hidden_size(model) * element
    if not with_gradients:
        return hidden
    windows = min(config.gradient_windows, config.nsamples)
    return max(hidden, windows * config.window_length * _hidden_size(model) * element * (len(layout.blocks) + 1))


def _loss_bytes(model: nn.Module, layout: Layout, config: DobiSVDConfig, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes needed while the loss is taken, by what takes them."""
    found = {"one window's logits": _logits_bytes(model, config.window_length)}
    if computes_in_float32(torch.device("cpu"), dtype):
        around = model_bytes(model.parameters())
        around -= sum(model_bytes(block.parameters()) for block in layout.blocks.values())
        found["embeddings and head in float32"] = 2 * around
    return found


def _larger(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Of two stages that follow each other, the one that takes more."""
    return max(one, other, key=lambda stage: sum(stage.values()))


def _logits_bytes(model: nn.Module, length: int) -> int:
    """Logits, their logarithms and their gradient, in float32."""
    return length * 3 * 4 * _vocabulary(model)


def _training_activations(model: nn.Module, layout: Layout, config: DobiSVDConfig, element: int) -> int:
    """Bytes that one window leaves for the backward pass: inputs and outputs of all linears, logits and gradient."""
    length = min(config.rank_training.seqlen or config.window_length, config.window_length)
    shapes = [weight_matrix(module).shape for module in layout.linears.values()]
    kept = length * sum(m + n for m, n in shapes) * element + _logits_bytes(model, length)
    if config.resolved_method().learning_mode == "activation":
        # Every output's decomposition, in float32: both sides, and the truncated one.
        kept += 4 * sum(length * m + min(length, m) * (length + m) for m, _ in shapes)
    return kept


def seconds_need(model: nn.Module, job: Job, speed: Speed, known: Known) -> dict[str, float]:
    """Return seconds by stage."""
    config, layout = job.config, job.layout
    seconds: dict[str, float] = {}
    tokens = config.nsamples * config.window_length
    inputs = [size for sizes in distinct_inputs(layout).values() for size in sizes]
    if needs_text(config) and not known.collected:
        forward = 2 * macs_of_blocks(layout) * tokens + 4 * len(
            layout.blocks
        ) * tokens * config.window_length * _hidden_size(model)
        # Blocks are computed in float32 where the model's own dtype is slower.
        rate = max(speed.model_products, speed.float32_products)
        seconds["calibration, forward"] = forward / rate
        if config.resolved_method().needs_gradients:
            # Boundaries, each block again, and its gradients by inputs only; the head; then the Grams of the outputs.
            backward = min(config.gradient_windows, config.nsamples) * config.window_length
            head = 2 * 2 * backward * _hidden_size(model) * _vocabulary(model)
            seconds["calibration, gradients"] = (3 * forward * backward / tokens + head) / rate
            outputs = [len(weight_matrix(module)) for module in layout.linears.values()]
            gram_elements = sum(size**2 for size in outputs)
            seconds["calibration, gradients"] += 2 * backward * gram_elements / speed.float32_products
        seconds["calibration, Grams"] = 2 * tokens * sum(size**2 for size in inputs) / speed.float32_products
    shapes = [weight_matrix(module).shape for module in layout.linears.values()]
    decompositions = sum(m * n * min(m, n) for m, n in shapes)
    if needs_text(config):
        # A symmetric eigenproblem takes about a third of the SVD of the same size.
        decompositions += sum(size**3 for size in inputs) // 3
    seconds["factorization"] = decompositions / speed.float64_svds
    if not known.scored:
        seconds["importance scores"] = decompositions / speed.float64_svds
    if job.given_plan is None and job.method.learns:
        training = config.rank_training
        length = min(training.seqlen or config.window_length, config.window_length)
        evaluated = (training.steps // training.evaluate_every + 1) * training.held_out * config.window_length
        # A step is a forward and a backward pass with weights' gradients; an evaluation a forward pass.
        passes = 3 * training.steps * training.windows * length + evaluated
        seconds["rank training"] = 2 * macs_of_blocks(layout) * passes / speed.model_products
        # Weights are rebuilt in every step, and every window's gradient of them projected on their directions.
        built = sum(m * n * min(m, n) for m, n in shapes)
        seconds["rank training"] += 2 * training.steps * (training.windows + 1) * built / speed.float32_products
        seconds["rank training"] += decompositions / speed.float64_svds
    return seconds


def macs_of_blocks(layout: Layout) -> int:
    """Multiply-adds per token of the linears in the blocks."""
    return sum(macs_per_token(block) for block in layout.blocks.values())


def _hidden_size(model: nn.Module) -> int:
    return model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]


def _vocabulary(model: nn.Module) -> int:
    return model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
