"""Perplexity against closed forms and a computation of its own."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration_tests.tiny_models import tiny
from optimum_dobisvd.evaluation.perplexity import perplexity

TEXT = "The president spoke to both houses while the dog ran over the hill. " * 40


TRIAL = 3
"""Passes over a few tokens that find out whether a model is one of the next token."""


class Constant(nn.Module):
    """Gives every token the same logits, whatever comes before it."""

    def __init__(self, logits: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.to(dtype))
        self.seen: list[Tensor] = []

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        assert not self.training
        self.seen.append(input_ids)
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_a_uniform_guess_has_the_vocabulary_as_its_perplexity(tiny_tokenizer: Any) -> None:
    assert perplexity(Constant(torch.zeros(300)), tiny_tokenizer, TEXT, seqlen=30) == pytest.approx(300, rel=1e-6)


def test_windows_are_consecutive_complete_and_from_the_start(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer(TEXT)["input_ids"]
    model = Constant(torch.zeros(300))
    perplexity(model, tiny_tokenizer, TEXT, seqlen=32)
    assert torch.cat(model.seen[TRIAL:]).flatten().tolist() == ids[: len(ids) // 32 * 32]
    model.seen.clear()
    perplexity(model, tiny_tokenizer, TEXT, seqlen=32, windows=3)
    assert torch.cat(model.seen[TRIAL:]).shape == (3, 32)
    model.seen.clear()
    perplexity(model, tiny_tokenizer, TEXT, seqlen=len(ids), windows=1000)
    assert torch.cat(model.seen[TRIAL:]).shape == (1, len(ids)), "more windows than there are is no error"


@pytest.mark.parametrize("seqlen", [2, 31, 600])
def test_it_is_the_token_level_mean_of_a_real_model(tiny_tokenizer: Any, seqlen: int) -> None:
    model = tiny("llama", max_position_embeddings=1024)
    ids = torch.tensor(tiny_tokenizer(TEXT)["input_ids"])[: seqlen * 2].view(2, seqlen)
    with torch.no_grad():
        logs = model(ids).logits.double().log_softmax(-1)[:, :-1]
    expected = math.exp(-logs.gather(2, ids[:, 1:, None]).mean().item())
    assert perplexity(model, tiny_tokenizer, TEXT, seqlen=seqlen, windows=2) == pytest.approx(expected, rel=1e-5)


def test_half_precision_logits_are_summed_in_float32(tiny_tokenizer: Any) -> None:
    logits = torch.linspace(-3, 3, 300)
    single = perplexity(Constant(logits.bfloat16().float()), tiny_tokenizer, TEXT, seqlen=64)
    half = perplexity(Constant(logits, torch.bfloat16), tiny_tokenizer, TEXT, seqlen=64)
    assert half == pytest.approx(single, rel=1e-6)


def test_the_model_is_left_in_the_mode_it_was_in(tiny_tokenizer: Any) -> None:
    model = Constant(torch.zeros(300)).train()
    perplexity(model, tiny_tokenizer, TEXT, seqlen=30, windows=1)
    assert model.training


def test_a_loss_that_is_not_finite_names_the_window(tiny_tokenizer: Any) -> None:
    model = Constant(torch.zeros(300))
    original = model.forward

    def fails_third(input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        output = original(input_ids, **kwargs)
        return SimpleNamespace(logits=output.logits * (math.nan if len(model.seen) == TRIAL + 3 else 1))

    model.forward = fails_third  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="window 2 of 5"):
        perplexity(model.train(), tiny_tokenizer, TEXT, seqlen=30, windows=5)
    assert model.training


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seqlen": 100_000}, "less than one window of seqlen=100000"),
        ({"seqlen": 1}, "at least 2"),
        ({"seqlen": 30, "windows": 0}, "windows must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(tiny_tokenizer: Any, settings: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        perplexity(Constant(torch.zeros(300)), tiny_tokenizer, TEXT, **settings)
