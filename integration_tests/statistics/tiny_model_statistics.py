"""Statistics of tiny models by the package's way, and inputs by plain hooks on full passes to hold against them."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from optimum_dobisvd.calibration.backward import BackwardRunner
from optimum_dobisvd.calibration.dataset import CalibrationWindows
from optimum_dobisvd.calibration.loss import NextTokenLoss
from optimum_dobisvd.calibration.runner import BlockRunner
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.statistics.collect import InputCollector
from optimum_dobisvd.statistics.fingerprint import fingerprint
from optimum_dobisvd.statistics.gradients import GradientCollector
from optimum_dobisvd.statistics.store import StatisticsStore, full_gram


def windows_of(ids: Tensor, mask: Tensor | None = None) -> CalibrationWindows:
    mask = torch.ones_like(ids) if mask is None else mask
    return CalibrationWindows(ids, mask.bool(), {"dataset": "tokens"})


def collect(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    batch_size: int = 2,
    exclude: Iterable[str] = (),
    device: str | None = None,
) -> StatisticsStore:
    """What the quantizer does with a store: open it, and collect the blocks it lacks."""
    layout = find_layout(model, exclude)
    windows = windows_of(ids, mask)
    store = StatisticsStore(fingerprint(model, windows), list(layout.blocks), folder)
    collector = InputCollector(layout.linears_of, store.put, lambda block: not store.has(block))
    BlockRunner(model, layout.blocks, windows, batch_size=batch_size, device=device).run(collector)
    return store


def collect_gradients(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    batch_size: int = 2,
    loss: NextTokenLoss | None = None,
    store_class: type[StatisticsStore] = StatisticsStore,
) -> StatisticsStore:
    """What the quantizer does with a store's gradients: open them, and collect the blocks it lacks."""
    layout = find_layout(model)
    windows = windows_of(ids, mask)
    store = store_class(fingerprint(model, windows), list(layout.blocks), folder)
    store.open_gradients({"tokens": int(windows.attention_mask.sum()), "fisher": "empirical"})
    collector = GradientCollector(layout.linears_of, store.put_gradients, lambda block: not store.has_gradients(block))
    runner = BackwardRunner(model, layout.blocks, windows, batch_size=batch_size)
    runner.run_backward(collector, loss or NextTokenLoss())
    return store


def grams_of(store: StatisticsStore, blocks: Iterable[str]) -> dict[str, Tensor]:
    """`H` by linear, float64."""
    found = {}
    for block in blocks:
        statistics = store.block(block)
        for linear, input_key in statistics.input_key.items():
            found[linear] = full_gram(statistics.inputs[input_key])
    return found


def inputs_by_linear(model: nn.Module, names: Iterable[str], ids: Tensor, batch_size: int = 2) -> dict[str, Tensor]:
    """`X` (`n x T`, float64) of every linear, by hooks while the whole model runs as a user would run it."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().flatten(0, -2).double())
        )
        for name in seen
    ]
    with torch.no_grad():
        for batch in ids.split(batch_size):
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).T for name, parts in seen.items()}


def assert_gram_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal entry by entry, measured against the sizes of the two channels it belongs to."""
    scale = expected.diagonal().clamp_min(0).sqrt()
    difference = (found - expected).abs()
    assert bool((difference <= tolerance * scale[:, None] * scale + 1e-30).all()), float(difference.max())
