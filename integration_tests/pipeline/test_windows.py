"""Windows that a model cannot read are refused before a weight is read, and the usual length follows the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.evaluation.perplexity import perplexity

TEXTS = [f"Document {i}: the cat counted {i * i} mice, and the café stayed open.\nIt rained." for i in range(200)]


def settings(**changes: Any) -> dict[str, Any]:
    return {"method": "svd_llm", "ratio": 0.7, "dataset": TEXTS, "nsamples": 3, **changes}


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_the_usual_length_is_what_the_model_reads(tiny_tokenizer: Any, model_type: str) -> None:
    model = DobiSVDQuantizer(**settings()).quantize_model(tiny(model_type), tiny_tokenizer)
    assert model.dobisvd_report.dataset["seqlen"] == 128
    assert model.config.quantization_config.seqlen == 128


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_more_than_the_model_has_is_refused_with_what_it_has(tiny_tokenizer: Any, model_type: str) -> None:
    name = type(tiny(model_type)).__name__
    with pytest.raises(ValueError, match=f"seqlen=129 was asked for, and {name} has 128 positions: use 128 or fewer"):
        DobiSVDQuantizer(**settings(seqlen=129)).prepare(tiny(model_type), tiny_tokenizer)
    with pytest.raises(ValueError, match=f"windows have 200 tokens, and {name} has 128 positions"):
        DobiSVDQuantizer(**settings(dataset=tokens(3, 200))).prepare(tiny(model_type))
    DobiSVDQuantizer(**settings(seqlen=129)).prepare(tiny("llama"), tiny_tokenizer)


def test_tokens_that_the_model_has_no_embedding_for_are_named(tiny_tokenizer: Any) -> None:
    model = tiny("llama", vocab_size=90)
    with pytest.raises(ValueError, match=r"text \(texts\) has the token \d+, and .* LlamaForCausalLM has 90 rows"):
        DobiSVDQuantizer(**settings()).prepare(model, tiny_tokenizer)
    with pytest.raises(ValueError, match=r"\(tokens\) has the token 90, and"):
        DobiSVDQuantizer(**settings(dataset=torch.tensor([[1, 90]]))).prepare(model)
    with pytest.raises(ValueError, match="the text has the token"):
        perplexity(model, tiny_tokenizer, TEXTS[0] * 9, seqlen=20)
    with pytest.raises(ValueError, match="seqlen=200 were asked for, and GPT2LMHeadModel has 128 positions"):
        perplexity(tiny("gpt2"), tiny_tokenizer, "\n".join(TEXTS), seqlen=200)


def test_compression_at_load_is_refused_before_the_weights(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(GPT2LMHeadModel, "_load_pretrained_model", lambda *a, **k: pytest.fail("weights are read"))
    for changes, message in (({"seqlen": 300}, "128 positions"), ({"dataset": torch.tensor([[1, 300]])}, "300 rows")):
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=DobiSVDConfig(**settings(**changes)))
