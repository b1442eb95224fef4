"""Blocks are run one by one as the model would run them, and whatever happens the model is given back as it was."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn

from integration_tests.calibration.stateful_models import STATEFUL, Plain, RemembersItself, RunsBackwards, make
from integration_tests.statistics.tiny_model_statistics import (
    assert_gram_close,
    collect,
    grams_of,
    inputs_by_linear,
    windows_of,
)
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.calibration.runner import BlockRunner, hidden_of
from optimum_dobisvd.model.layout import find_layout

FALLBACK = "passes state between its blocks"


class Diary:
    """A visitor that writes down what it is told, and fails where it is asked to."""

    needs_token_order = False

    def __init__(self, wanted: Any = lambda name: True, fail_at: str | None = None) -> None:
        self.events: list[str] = []
        self.masks: list[Tensor] = []
        self._wanted = wanted
        self._fail_at = fail_at

    def wants(self, name: str) -> bool:
        return self._wanted(name)

    def enter(self, name: str, block: nn.Module) -> None:
        assert isinstance(block, nn.Module)
        self._note(f"enter {name[-1]}")

    def start_batch(self, mask: Tensor) -> None:
        self.masks.append(mask)
        self._note("batch")

    def leave(self, name: str, block: nn.Module) -> None:
        self._note(f"leave {name[-1]}")

    def abandon(self) -> None:
        self.events.append("abandon")

    def _note(self, event: str) -> None:
        self.events.append(event)
        if event == self._fail_at:
            raise KeyboardInterrupt


def run(model: nn.Module, visitor: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> None:
    BlockRunner(model, find_layout(model).blocks, windows_of(ids, mask), **{"batch_size": 2, **kwargs}).run(visitor)


def test_every_block_takes_every_batch_before_the_next_begins() -> None:
    diary = Diary()
    run(tiny("llama"), diary, tokens(5, 8))
    assert diary.events == [
        event for block in "012" for event in (f"enter {block}", "batch", "batch", "batch", f"leave {block}")
    ]
    assert [tuple(mask.shape) for mask in diary.masks[:3]] == [(2, 8), (2, 8), (1, 8)]


def test_blocks_that_nobody_wants_run_unwatched_and_feed_the_next() -> None:
    diary = Diary(lambda name: name.endswith("2"))
    model = tiny("llama")
    inputs: list[Tensor] = []
    model.model.layers[2].register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    ids = tokens(2, 8)
    model(ids)
    run(model, diary, ids)
    assert diary.events == ["enter 2", "batch", "leave 2"]
    assert torch.equal(inputs[0], inputs[-1])
    assert inputs[0].shape == (2, 8, 32)


@pytest.mark.parametrize("kind", STATEFUL)
def test_models_that_pass_state_between_blocks_run_in_full(
    kind: type[Plain], caplog: pytest.LogCaptureFixture
) -> None:
    model = make(kind)
    ids = tokens(5, 10)
    layout = find_layout(model)
    with caplog.at_level(logging.WARNING):
        found = grams_of(collect(model, ids), layout.blocks)
    assert f"{kind.__name__} {FALLBACK}" in caplog.text
    for name, x in inputs_by_linear(model, layout.linears, ids).items():
        assert_gram_close(found[name], x @ x.T)


def test_blocks_that_cannot_be_replayed_run_in_full(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(make(RemembersItself), Diary(), tokens(3, 10))
    assert FALLBACK in caplog.text


@pytest.mark.parametrize("kind", [Plain, RunsBackwards])
def test_a_model_that_passes_none_runs_block_by_block(kind: type[Plain], caplog: pytest.LogCaptureFixture) -> None:
    model = make(kind)
    ids = tokens(5, 10)
    layout = find_layout(model)
    with caplog.at_level(logging.WARNING):
        found = grams_of(collect(model, ids), layout.blocks)
    assert FALLBACK not in caplog.text
    for name, x in inputs_by_linear(model, layout.linears, ids).items():
        assert_gram_close(found[name], x @ x.T)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox", "gemma3_text", "phi", "mixtral"])
def test_transformers_models_run_block_by_block(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[2, 7:] = False
    with caplog.at_level(logging.WARNING):
        run(tiny(model_type), Diary(), tokens(3, 12), mask)
    assert FALLBACK not in caplog.text


class Residence:
    """Where the blocks' weights are said to be, by the moves that `nn.Module.to` is asked for."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        blocks = {module: name for name, module in find_layout(model).blocks.items()}
        self.resident: set[str] = set()
        self.most = 0
        self.moves: list[str] = []
        original = nn.Module.to

        def to(module: nn.Module, device: Any) -> nn.Module:
            if module in blocks:
                arriving = torch.device(device).index is not None
                (self.resident.add if arriving else self.resident.discard)(blocks[module])
                self.moves.append(f"{'to' if arriving else 'from'} {blocks[module][-1]}")
                self.most = max(self.most, len(self.resident))
            return original(module, device)

        monkeypatch.setattr(nn.Module, "to", to)


# `cpu:0` is the same place as `cpu` under another name: blocks are sent there and back, and no accelerator is needed.
def test_one_block_at_a_time_is_on_the_compute_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    residence = Residence(model, monkeypatch)
    present: list[set[str]] = []

    class Watching(Diary):
        def enter(self, name: str, block: nn.Module) -> None:
            assert residence.resident == {name}
            block.register_forward_pre_hook(lambda *_: present.append(set(residence.resident)))

        def leave(self, name: str, block: nn.Module) -> None:
            assert residence.resident == set(), "what replaces its linears must find the block where it lives"

    run(model, Watching(), tokens(4, 8), device="cpu:0")
    assert residence.most == 1
    assert residence.resident == set()
    assert residence.moves[-6:] == ["to 0", "from 0", "to 1", "from 1", "to 2", "from 2"]
    assert present == [{f"model.layers.{index}"} for index in (0, 0, 1, 1, 2, 2)]


def test_a_block_goes_home_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    residence = Residence(model, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(model, Diary(fail_at="leave 1"), tokens(4, 8), device="cpu:0")
    assert residence.moves[-2:] == ["to 1", "from 1"]
    assert residence.resident == set()


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu:0", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_another_compute_device_gives_the_same_statistics(device: str) -> None:
    model = tiny("llama")
    ids = tokens(4, 16)
    layout = find_layout(model)
    expected = grams_of(collect(model, ids), layout.blocks)
    away: list[set[str]] = []
    for layer in layout.blocks.values():
        layer.register_forward_pre_hook(
            lambda *_: away.append({name for name, parameter in model.named_parameters() if parameter.is_cuda})
        )
    found = grams_of(collect(model, ids, device=device), layout.blocks)
    for name, gram in expected.items():
        assert_gram_close(found[name], gram)
    blocks = {name: {f"{name}.{key}" for key, _ in block.named_parameters()} for name, block in layout.blocks.items()}
    if device == "cuda":
        assert away[-6:] == [blocks[f"model.layers.{index}"] for index in (0, 0, 1, 1, 2, 2)]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a run touches and must put back."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "forward": {name: module.__dict__.get("forward") for name, module in model.named_modules()},
        "hooks": {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "use_cache": model.config.use_cache,
        "weights": {
            name: (id(tensor), float(tensor.detach().double().sum())) for name, tensor in model.named_parameters()
        },
        "grad": torch.is_grad_enabled(),
    }


FAILURES = [None, "enter 0", "batch", "leave 1", "enter 2"]


@pytest.mark.parametrize("fail_at", FAILURES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_model_is_given_back_as_it_was(fail_at: str | None, use_cache: bool) -> None:
    model = tiny("llama")
    model.config.use_cache = use_cache
    model.train()
    model.model.layers[1].mlp.eval()  # a frozen part
    model.model.layers[0].register_forward_hook(lambda *_: None)  # somebody else's
    before = state_of(model)
    diary = Diary(fail_at=fail_at)
    if fail_at is None:
        run(model, diary, tokens(3, 8))
    else:
        with pytest.raises(KeyboardInterrupt):
            run(model, diary, tokens(3, 8))
    assert state_of(model) == before
    assert diary.events.count("abandon") == (fail_at is not None)


def test_calibration_runs_in_evaluation_mode_without_gradients() -> None:
    model = tiny("opt", dropout=0.9, layerdrop=0.9)
    ids = tokens(4, 16)
    expected = grams_of(collect(model, ids), find_layout(model).blocks)
    found = grams_of(collect(model.train(), ids), find_layout(model).blocks)
    assert model.training
    for name, gram in expected.items():
        assert torch.equal(found[name], gram)

    class Looking(Diary):
        def enter(self, name: str, block: nn.Module) -> None:
            block.register_forward_hook(
                lambda _, __, output: states.append((torch.is_grad_enabled(), hidden_of(output).requires_grad))
            )

    states: list[tuple[bool, bool]] = []
    run(model, Looking(), ids)
    assert set(states) == {(False, False)}


@pytest.mark.parametrize("fail_at", [None, "leave 1"])
@pytest.mark.parametrize("where", ["cpu", "disk", "blocks"])
def test_offloaded_models_stay_offloaded_and_give_the_same_statistics(
    tmp_path: Path, where: str, fail_at: str | None
) -> None:
    model = tiny("llama")
    ids = tokens(4, 16)
    blocks = list(find_layout(model).blocks)
    expected = grams_of(collect(model, ids), blocks)
    device = torch.device("cpu")
    if where == "cpu":
        cpu_offload(model, execution_device=device)
    elif where == "blocks":  # as a device map does it, with hooks on the blocks themselves
        parts = ["model.embed_tokens", *blocks, "model.norm", "model.rotary_emb", "lm_head"]
        dispatch_model(
            model, dict.fromkeys(parts, "disk") | {"lm_head": "cpu"}, offload_dir=tmp_path, main_device="cpu"
        )
        assert all("forward" in model.get_submodule(name).__dict__ for name in blocks)
    else:
        disk_offload(model, tmp_path, execution_device=device)
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    if fail_at is None:
        found = grams_of(collect(model, ids), blocks)
        assert all(torch.equal(found[name], gram) for name, gram in expected.items())
    else:
        with pytest.raises(KeyboardInterrupt):
            run(model, Diary(fail_at=fail_at), ids, device="cpu:0")
    assert {parameter.device.type for parameter in model.model.parameters()} == {"meta"}
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards


def spoil(model: nn.Module, name: str, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(name)[3] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_block_whose_output_is_not_finite_is_named(model_type: str, value: float) -> None:
    model = tiny(model_type)
    name = {"llama": "model.layers.1", "gpt2": "transformer.h.1"}[model_type]
    norm = {"llama": "post_attention_layernorm", "gpt2": "ln_2"}[model_type]
    spoil(model, f"{name}.{norm}.weight", value)
    before = state_of(model)["hooks"]
    with pytest.raises(ValueError, match=rf"{name.replace('.', '[.]')}: its output has NaN or infinite values"):
        collect(model, tokens(4, 8))
    assert state_of(model)["hooks"] == before


def test_activations_that_overflow_half_precision_are_named() -> None:
    model = tiny("llama", dtype=torch.float16)
    model.model.layers[2].mlp.down_proj.weight.data.mul_(1e5).clamp_(-6e4, 6e4)
    with pytest.raises(ValueError, match=r"model\.layers\.2: its output .* load the model in float32 or bfloat16"):
        collect(model, tokens(4, 8))


@pytest.mark.parametrize("row", [0, 4])
def test_embeddings_that_are_not_finite_are_not_blamed_on_a_block(row: int) -> None:
    """Whether the token stands in the first window or only in the last."""
    model = tiny("llama")
    ids = tokens(5, 8)
    ids[row, 5] = 299
    ids[ids.eq(299) & (torch.arange(5)[:, None] != row)] = 2
    spoil(model, "model.embed_tokens.weight", 1.0)
    model.model.embed_tokens.weight.data[299] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.0: its input, the embeddings, has NaN"):
        collect(model, ids)


def test_a_late_window_is_checked_too() -> None:
    model = make(Plain)
    ids = tokens(6, 8, vocab_size=200)
    ids[5, 3] = 250
    model.embedding.weight.data[250] = 1000.0
    model.layers[1].register_forward_hook(lambda _, args, output: torch.where(args[0] > 500, torch.inf, output))
    with pytest.raises(ValueError, match=r"layers\.1: its output"):
        collect(model, ids, batch_size=1)


@pytest.mark.parametrize("kind", [Plain, *STATEFUL])
def test_the_block_is_named_in_models_that_run_in_full_too(kind: type[Plain]) -> None:
    model = make(kind)
    model.layers[1].down.bias.data[0] = float("nan")
    if kind.__name__ in ("ReturnsDictionary",):
        match = r"layers\.2\.up: its inputs have NaN"  # such outputs cannot be read, what the next linear gets can
    else:
        match = r"layers\.1: its output has NaN"
    with pytest.raises(ValueError, match=match):
        collect(model, tokens(4, 8))


def test_what_happens_to_padding_is_no_error() -> None:
    """Some models leave NaN where a row attends to nothing."""
    model = make(Plain)
    model.embedding.weight.data[7] = float("nan")
    ids, mask = tokens(4, 8), torch.ones(4, 8, dtype=torch.bool)
    ids[ids == 7] = 8
    ids[1, 5:], mask[1, 5:] = 7, False
    found = grams_of(collect(model, ids, mask), ["layers.0", "layers.1", "layers.2"])
    x = [inputs_by_linear(model, found, row[keep][None]) for row, keep in zip(ids, mask, strict=True)]
    for name, gram in found.items():
        together = torch.cat([each[name] for each in x], 1)
        assert_gram_close(gram, together @ together.T)
