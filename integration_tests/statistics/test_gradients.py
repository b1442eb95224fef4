"""Gradient statistics by blocks are those of an ordinary backward pass."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from integration_tests.calibration.stateful_models import STATEFUL, Plain, SkipsABlock, make
from integration_tests.statistics.tiny_model_statistics import assert_gram_close, collect_gradients, windows_of
from integration_tests.tiny_models import UNUSUAL, tiny, tokens
from optimum_dobisvd.calibration.backward import BackwardRunner
from optimum_dobisvd.calibration.loss import NextTokenLoss
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.model.linears import weight_matrix
from optimum_dobisvd.statistics.gradients import GradientCollector, GradientStatistics
from optimum_dobisvd.statistics.store import StatisticsStore, full_gram


def expected_of(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> dict[str, dict[str, Any]]:
    """The statistics from full backward passes, window by window, with plain hooks and float64 sums."""
    linears = find_layout(model).linears
    rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in linears}
    mask = torch.ones_like(ids).bool() if mask is None else mask.bool()

    def watch(name: str, module: Any, args: tuple, output: Tensor, keep: Tensor) -> None:
        x = args[0].detach()
        y = x @ weight_matrix(module).T
        output.register_hook(
            lambda g: rows[name].append(tuple(each.flatten(0, -2)[keep].double() for each in (x, y, g)))
        )

    for window, keep in zip(ids, mask, strict=True):
        handles = [
            module.register_forward_hook(lambda m, a, o, name=name, keep=keep: watch(name, m, a, o, keep))
            for name, module in linears.items()
        ]
        padding = {} if bool(keep.all()) else {"attention_mask": keep[None].long()}
        logits = model(window[None], **padding).logits[0]
        labels = torch.where(keep[1:] & keep[:-1], window[1:], -100)
        cross_entropy(logits[:-1], labels, reduction="sum", ignore_index=-100).backward()
        for handle in handles:
            handle.remove()
    model.zero_grad()
    found = {}
    for name, parts in rows.items():
        x, y, g = (torch.cat(each) for each in zip(*parts, strict=True))
        found[name] = {
            "gram": g.T @ g,
            "tokens": len(g),
            "energy": g.square().sum(),
            "joint_energy": (x.square().sum(1) * g.square().sum(1)).sum(),
            "first_order": (g * y).sum(),
            "second_order": (g * y).sum(1).square().sum(),
        }
    return found


def assert_equal(store: StatisticsStore, model: nn.Module, expected: dict[str, dict[str, Any]]) -> None:
    layout = find_layout(model)
    for block in layout.blocks:
        found = store.gradients(block)
        assert set(found) == set(layout.linears_of(block))
        for name, statistics in found.items():
            assert statistics.tokens == expected[name]["tokens"]
            assert_gram_close(full_gram(statistics), expected[name]["gram"], 1e-4)
            # A norm right after a linear makes the loss blind to its scale: what is left of the products is rounding.
            rounding = 1e-7 * float(expected[name]["joint_energy"])
            for key in ("energy", "joint_energy", "second_order"):
                value = float(expected[name][key])
                assert getattr(statistics, key) == pytest.approx(value, rel=1e-4, abs=rounding), (name, key)
            scale = (float(expected[name]["second_order"]) + rounding) ** 0.5
            assert statistics.first_order == pytest.approx(float(expected[name]["first_order"]), abs=1e-3 * scale)


@pytest.mark.parametrize(
    "model_type", ["llama", "llama_tied", "qwen2", "mistral", "gemma2", "phi", "opt", "gpt2", *UNUSUAL]
)
def test_gradients_by_blocks_are_those_of_full_backward_passes(model_type: str) -> None:
    model, ids = tiny(model_type), tokens(5, 12)
    assert_equal(collect_gradients(model, ids), model, expected_of(model, ids))


def test_padding_has_no_gradient_and_is_not_counted() -> None:
    model, ids = tiny("llama"), tokens(4, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, 3:] = 0
    assert_equal(collect_gradients(model, ids, mask), model, expected_of(model, ids, mask))


@pytest.mark.parametrize("kind", [Plain, *(kind for kind in STATEFUL if kind is not SkipsABlock)])
def test_models_that_pass_state_between_blocks_are_differentiated_as_one(kind: type[Plain]) -> None:
    body = make(kind)

    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = body
            self.head = nn.Linear(12, 300)

        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            return SimpleNamespace(logits=self.head(self.base_model(input_ids)))

    model, ids = WithHead(), tokens(4, 6)
    # Window by window: what some of these models leave behind is right for the latest pass only.
    assert_equal(collect_gradients(model, ids, batch_size=1), model, expected_of(model, ids))


def test_an_offloaded_model_gives_the_same() -> None:
    model, ids = tiny("llama"), tokens(4, 12)
    expected = expected_of(model, ids)
    cpu_offload(model, execution_device="cpu")
    assert_equal(collect_gradients(model, ids), tiny("llama"), expected)


def test_nothing_of_the_model_is_changed() -> None:
    model, ids = tiny("llama"), tokens(2, 12)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    collect_gradients(model, ids)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.layers.1.mlp.up_proj.weight"
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sampled_labels_are_the_models_own_and_reproducible(tmp_path: Path) -> None:
    """On a model that is certain, its own labels cost next to nothing, whatever the text says."""
    model, ids = tiny("llama"), tokens(4, 12)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    empirical, sampled = NextTokenLoss("empirical"), NextTokenLoss("sampled")
    collect_gradients(model, ids, loss=empirical)
    first = collect_gradients(model, ids, loss=sampled)
    again = collect_gradients(model, ids, loss=NextTokenLoss("sampled"))
    assert empirical.tokens == sampled.tokens == 4 * 11
    assert sampled.total < 0.2 * empirical.total
    for block in find_layout(model).blocks:
        for name, found in first.gradients(block).items():
            assert torch.equal(found.gram, again.gradients(block)[name].gram)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_stopped_run_goes_on_and_gives_the_same_bits(tmp_path: Path, done: int) -> None:
    model, ids = tiny("llama"), tokens(5, 12)
    uninterrupted = collect_gradients(model, ids, folder=tmp_path / "uninterrupted")
    finished: list[str] = []

    class Stops(StatisticsStore):
        def put_gradients(self, block: str, gradients: dict[str, GradientStatistics]) -> None:
            if len(finished) == done:
                raise KeyboardInterrupt
            finished.append(block)
            super().put_gradients(block, gradients)

    with pytest.raises(KeyboardInterrupt):
        collect_gradients(model, ids, folder=tmp_path / "stopped", store_class=Stops)
    assert finished == list(reversed(find_layout(model).blocks))[:done]
    resumed = collect_gradients(model, ids, folder=tmp_path / "stopped")
    for block in find_layout(model).blocks:
        for name, found in uninterrupted.gradients(block).items():
            other = resumed.gradients(block)[name]
            assert torch.equal(found.gram, other.gram)
            assert found.joint_energy == other.joint_energy


def test_a_store_survives_its_process(tmp_path: Path) -> None:
    model, ids = tiny("llama"), tokens(3, 12)
    in_memory, on_disk = collect_gradients(model, ids), collect_gradients(model, ids, folder=tmp_path / "s")
    reopened = StatisticsStore(on_disk.fingerprint, list(find_layout(model).blocks), tmp_path / "s")
    assert reopened.gradient_tokens == 36
    for block in find_layout(model).blocks:
        for name, found in in_memory.gradients(block).items():
            other = reopened.gradients(block)[name]
            assert torch.equal(found.gram, other.gram)
            assert (found.size, found.tokens, found.energy) == (other.size, other.tokens, other.energy)


def test_gradients_of_other_settings_are_refused_with_the_field(tmp_path: Path) -> None:
    model, ids = tiny("llama"), tokens(3, 12)
    store = collect_gradients(model, ids, folder=tmp_path / "s")
    settings = json.loads((tmp_path / "s" / "gradients.json").read_text())
    settings.pop("format_version")
    store.open_gradients(settings)
    with pytest.raises(ValueError, match="fisher: 'empirical' in the store, 'sampled' now"):
        store.open_gradients({**settings, "fisher": "sampled"})


def test_a_store_without_gradients_says_how_to_get_them(tmp_path: Path) -> None:
    model = tiny("llama")
    blocks = list(find_layout(model).blocks)
    for store in (StatisticsStore({}, blocks), StatisticsStore({}, blocks, tmp_path / "s")):
        with pytest.raises(ValueError, match=r"have no gradients.*compress.*svd_llm_v2"):
            store.gradients(blocks[0])


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_damaged_gradients_are_named(tmp_path: Path, damage: bytes | None) -> None:
    model, ids = tiny("llama"), tokens(3, 12)
    store = collect_gradients(model, ids, folder=tmp_path / "s")
    path = tmp_path / "s" / "gradients-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(ValueError, match=r"gradients-00001.safetensors is damaged.*delete this file"):
        store.gradients("model.layers.1")


class Blind(nn.Module):
    """Wraps a model's logits so that the loss has no gradient, or none at all, or is NaN."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.model = tiny("llama")
        self._change = change

    @property
    def base_model(self) -> nn.Module:
        return self.model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self._change(self.model(*args, **kwargs).logits))


def test_a_loss_without_any_gradient_is_an_error_that_names_the_block() -> None:
    with pytest.raises(ValueError, match=r"after .*layers.2, the last block, is zero on every .*svd_llm_v2"):
        collect_gradients(Blind(lambda logits: logits * 0), tokens(2, 8))


def test_a_loss_that_is_nan_says_where() -> None:
    with pytest.raises(ValueError, match=r"the loss is nan after 0 tokens"):
        collect_gradients(Blind(lambda logits: logits * float("nan")), tokens(2, 8))


def test_gradients_whose_settings_are_lost_are_collected_again_and_their_spectra_dropped(tmp_path: Path) -> None:
    store = collect_gradients(tiny("llama"), tokens(3, 12), folder=tmp_path / "s")
    store.put_spectra("kfac", {"a": torch.ones(3)})
    (tmp_path / "s" / "gradients.json").unlink()
    again = StatisticsStore(store.fingerprint, list(find_layout(tiny("llama")).blocks), tmp_path / "s")
    again.open_gradients({"tokens": 36})
    assert not again.has_gradients("model.layers.0")
    assert again.spectra("kfac") is None


def test_text_without_labels_is_an_error() -> None:
    ids, mask = tokens(2, 8), torch.zeros(2, 8)
    mask[:, 0] = 1
    with pytest.raises(ValueError, match="the calibration text: no token has a label"):
        collect_gradients(tiny("llama"), ids, mask)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel gives no next-token logits"):
        collect_gradients(tiny("llama").model, tokens(2, 8))


class Breaks(torch.autograd.Function):
    """Passes its input on, and fails in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise KeyboardInterrupt


@pytest.mark.parametrize("as_one", [False, True])
def test_hooks_are_gone_after_an_error_inside_a_block(as_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    block = model.model.layers[1]
    forward = block.forward
    block.forward = lambda *args, **kwargs: Breaks.apply(forward(*args, **kwargs))
    if as_one:
        monkeypatch.setattr(BackwardRunner, "_blocks_stand_alone", lambda self: False)
    with pytest.raises(KeyboardInterrupt):
        collect_gradients(model, tokens(2, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [name for name, module in model.named_modules() if "forward" in module.__dict__] == ["model.layers.1"]
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.layers.1.mlp.up_proj.weight"
    ]


def test_no_gradient_goes_to_blocks_before_the_first_wanted_one() -> None:
    model, ids = tiny("llama"), tokens(2, 8)
    layout = find_layout(model)
    backward: list[str] = []

    def watch(name: str, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: backward.append(name))

    for name, block in layout.blocks.items():
        block.register_forward_hook(lambda _, args, output, name=name: watch(name, output))
    collector = GradientCollector(layout.linears_of, lambda *_: None, lambda block: block.endswith("1"))
    BackwardRunner(model, layout.blocks, windows_of(ids)).run_backward(collector, NextTokenLoss())
    assert set(backward) == {"model.layers.2", "model.layers.1"}
