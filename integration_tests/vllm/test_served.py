"""vLLM generates the tokens that transformers generates, whatever a checkpoint's matrices are written in.

In float32: in 16 bits two programs that add in another order may choose between tokens that are as likely.
"""

from pathlib import Path
from typing import Any

import pytest

from integration_tests.mixed_checkpoint import mixed_checkpoint
from integration_tests.vllm.serving import random_prompts, transformers_tokens, vllm_tokens

EAGER, COMPILED = {"enforce_eager": True}, {"enforce_eager": False}
TWO = {"tensor_parallel_size": 2}
# One head of keys and values for two processes: each has all of it.
ONE_KV_HEAD = {"num_key_value_heads": 1}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives a checkpoint and its tokens by transformers, made when first asked for."""
    root, made = tmp_path_factory.mktemp("served"), {}

    def of(architecture: str, **sizes: Any) -> tuple[Path, list[list[int]]]:
        name = "-".join([architecture, *map(str, sizes.values())])
        if name not in made:
            folder = mixed_checkpoint(root / name, architecture, **sizes)
            made[name] = folder, transformers_tokens(folder, random_prompts())
        return made[name]

    return of


@pytest.mark.parametrize(
    ("architecture", "sizes", "options"),
    [
        ("llama", {}, EAGER),
        ("llama", {}, COMPILED),
        ("llama", {}, {**EAGER, **TWO}),
        ("llama", ONE_KV_HEAD, {**EAGER, **TWO}),
        ("qwen2", {}, EAGER),  # biases
        ("qwen2", {}, {**COMPILED, **TWO}),
        ("qwen3", {}, {**EAGER, **TWO}),  # norms of heads
        ("qwen3", {}, COMPILED),
        ("phi3", {}, EAGER),  # one matrix for q, k and v in the checkpoint, too
        ("phi3", {}, {**EAGER, **TWO}),
    ],
)
def test_greedy_tokens_are_those_of_transformers(checkpoints, architecture, sizes, options):
    folder, expected = checkpoints(architecture, **sizes)
    assert vllm_tokens(folder, random_prompts(), **options) == expected


def test_without_the_plugin_the_transformers_backend_loads_it(checkpoints):
    folder, expected = checkpoints("llama")
    without = {"VLLM_PLUGINS": "none", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    backend = {"model_impl": "transformers", "trust_remote_code": True, "hf_overrides": {"quantization_config": None}}
    assert vllm_tokens(folder, random_prompts(), without, **EAGER, **backend) == expected


def test_with_the_plugin_the_transformers_backend_is_served_by_it(checkpoints):
    folder, expected = checkpoints("llama")
    assert vllm_tokens(folder, random_prompts(), **EAGER, model_impl="transformers") == expected
