"""On a CPU that has no instructions for bfloat16, blocks of such models are computed in float32."""

import platform
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration_tests.statistics.tiny_model_statistics import assert_gram_close, collect, collect_gradients, grams_of
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.calibration import temporarily
from optimum_dobisvd.statistics.store import full_gram

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="which CPUs have no such instructions is known for x86 only"
)
BLOCK = "model.layers.0"


@pytest.fixture(params=[False, True], ids=["without bf16", "with bf16"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(temporarily, "has_bf16_products", lambda: request.param)
    return bool(request.param)


def half(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A model in bfloat16, and the same values in float32."""
    model = tiny("llama", dtype=torch.bfloat16, **kwargs)
    wide = tiny("llama", **kwargs)
    wide.load_state_dict(model.state_dict())
    return model, wide


def contents(model: nn.Module) -> dict[str, tuple[int, int, torch.dtype]]:
    """What every parameter and buffer is: the object, and the memory behind it."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(tensor), tensor.data_ptr(), tensor.dtype) for name, tensor in held.items()}


def test_statistics_are_those_of_float32_and_the_model_is_as_before(native: bool) -> None:
    model, wide = half()
    before, ids = contents(model), tokens(4, 16)
    found, expected = (grams_of(collect(each, ids), [BLOCK]) for each in (model, wide))
    assert contents(model) == before
    # The embeddings are the same in both, so that all that can differ is how the block's first norm is computed.
    first = f"{BLOCK}.self_attn.q_proj"
    if native:
        with pytest.raises(AssertionError):
            assert_gram_close(found[first], expected[first])
    else:
        assert_gram_close(found[first], expected[first])


def test_gradients_are_taken_back_in_float32_too(native: bool) -> None:
    model, wide = half()
    ids = tokens(4, 16)
    seen: set[torch.dtype] = set()

    def watch(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.register_hook(lambda gradient: seen.add(gradient.dtype))

    # Every linear, the head too: its logits are the widest product of all.
    handles = [module.register_forward_hook(watch) for module in model.modules() if isinstance(module, nn.Linear)]
    before = contents(model)
    found = collect_gradients(model, ids).gradients(BLOCK)
    for handle in handles:
        handle.remove()
    assert contents(model) == before
    assert seen == {torch.bfloat16 if native else torch.float32}
    expected = collect_gradients(wide, ids).gradients(BLOCK)
    for name, statistics in found.items():
        one, other = full_gram(statistics), full_gram(expected[name])
        assert float((one - other).norm()) < (0.2 if native else 0.05) * float(other.norm()), name


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_may_be_tied_to_the_embeddings(tied: bool, native: bool) -> None:
    model, _ = half(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    seen: list[set[torch.dtype]] = []

    def watch(module: nn.Module, args: tuple[Tensor]) -> None:
        if torch.is_grad_enabled():
            seen.append({module.weight.dtype, args[0].dtype, *(each.dtype for each in inside.parameters())})

    inside = model.get_submodule(BLOCK)
    handle = model.lm_head.register_forward_pre_hook(watch)
    before = contents(model)
    collect_gradients(model, tokens(4, 16))
    handle.remove()
    assert contents(model) == before
    # Of the blocks, which compute nothing meanwhile, no second copy is held.
    assert seen == [{torch.bfloat16} if native else {torch.bfloat16, torch.float32}] * 4


def test_what_fails_in_the_head_leaves_the_model_as_it_was(native: bool) -> None:
    model, _ = half()
    before = contents(model)

    def fail(_module: nn.Module, _args: Any) -> None:
        if torch.is_grad_enabled():
            raise KeyboardInterrupt

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        collect_gradients(model, tokens(4, 16))
    assert contents(model) == before


def test_what_fails_inside_a_block_leaves_the_model_as_it_was(native: bool) -> None:
    model, _ = half()
    before = contents(model)
    calls: list[torch.dtype] = []

    def fail(module: nn.Module, args: tuple[Tensor]) -> None:
        calls.append(args[0].dtype)
        if native or args[0].dtype is torch.float32:
            raise KeyboardInterrupt

    model.get_submodule(f"{BLOCK}.mlp.up_proj").register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        collect(model, tokens(4, 16))
    assert calls[-1] is (torch.bfloat16 if native else torch.float32)
    assert contents(model) == before


def test_float16_stays_what_it_is() -> None:
    """Its overflows are to be found, not avoided."""
    assert not temporarily.computes_in_float32(torch.device("cpu"), torch.float16)
