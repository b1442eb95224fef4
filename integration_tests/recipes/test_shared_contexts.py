"""Questions read once for all their answers give the log-likelihoods of lm-eval's own way."""

import random
from typing import Any

import pytest

from integration_tests.tiny_models import tiny

pytest.importorskip("lm_eval", reason="lm-eval, which runs the tasks, is not installed")

from lm_eval.models.huggingface import HFLM

from recipes.frontier.shared_contexts import SharedContextLM

Request = tuple[tuple[str, str], list[int], list[int]]


def requests(lengths: list[tuple[int, list[int]]], seed: int = 0) -> list[Request]:
    """For each `(tokens of the context, [tokens of each answer])` the requests, all of them in any order."""
    draw = random.Random(seed)
    made = []
    for number, (context, answers) in enumerate(lengths):
        ids = draw.choices(range(3, 250), k=context)
        for answer in answers:
            made.append(((f"context {number}", "answer"), ids, draw.choices(range(3, 250), k=answer)))
    draw.shuffle(made)
    return made


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_log_likelihoods_are_those_of_one_answer_at_a_time(
    architecture: str, implementation: str, tiny_tokenizer: Any
) -> None:
    """One-token answers, a context of one token, sequences longer than a pack and than the model are among them."""
    model = tiny(architecture).eval()
    model.set_attn_implementation(implementation)
    options = {"pretrained": model, "tokenizer": tiny_tokenizer, "batch_size": 8, "max_length": 640}
    lengths = [(1, [3]), (5, [1, 1, 1, 1]), (40, [2, 30, 7]), (500, [20, 90]), (30, [1]), (630, [4, 20]), (100, [400])]
    asked = requests(lengths)
    alone = HFLM(**options)._loglikelihood_tokens(asked, disable_tqdm=True)
    together = SharedContextLM(**options)._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    for found, expected in zip(together, alone, strict=True):
        assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-4)


def test_a_model_that_sees_less_than_the_mask_allows_is_refused(tiny_tokenizer: Any) -> None:
    """A sliding window is not part of a mask that is passed whole."""
    model = tiny("mistral", sliding_window=4, initializer_range=0.5).eval()
    side_by_side = SharedContextLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=8, max_length=640)
    with pytest.raises(RuntimeError, match="MistralForCausalLM gives an answer .* evaluate it by HFLM"):
        side_by_side._loglikelihood_tokens(requests([(40, [5, 5])]), disable_tqdm=True)
