"""What is weighed by the next-token loss, or measured by it, is a next-token model: by what it computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
)

from integration_tests.tiny_models import MODEL_TYPES, VOCAB_SIZE, tiny, tokens
from optimum_dobisvd import DobiSVDQuantizer
from optimum_dobisvd.calibration.objective import require_next_token_model
from optimum_dobisvd.evaluation.perplexity import perplexity

BERT = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
BERT |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 1}
BART = {"vocab_size": VOCAB_SIZE, "d_model": 32, "pad_token_id": 1, "max_position_embeddings": 128}
BART |= {
    f"{part}_{what}": n
    for part in ("encoder", "decoder")
    for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}
T5 = {"vocab_size": VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def bert(model_class: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return model_class(BertConfig(**BERT, **settings)).eval()


def trained_bert() -> Any:
    """A masked LM that gives back the tokens it is shown, as a trained one does: its own loss is next to nothing."""
    model = bert(BertForMaskedLM)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        ids = tokens(16, 24, seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def check(model: Any, ids: Tensor | None = None, mask: Tensor | None = None) -> None:
    ids = tokens(3, 24) if ids is None else ids
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    require_next_token_model(model, ids, mask, why="this is a test", remedy="none")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_are(model_type: str, dtype: torch.dtype) -> None:
    check(tiny(model_type, dtype=dtype))


@pytest.mark.parametrize("length", [2, 3, 24])
def test_a_few_tokens_tell(length: int) -> None:
    check(tiny("llama"), tokens(1, length))
    with pytest.raises(ValueError, match="BertForMaskedLM is no next-token model"):
        check(bert(BertForMaskedLM), tokens(1, length))


def test_a_text_of_one_token_repeated_tells() -> None:
    with pytest.raises(ValueError, match="depend on later tokens"):
        check(bert(BertForMaskedLM), torch.full((1, 16), 7))


def test_padding_is_not_looked_at() -> None:
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.bool)
    mask[0, 1:] = False  # no label in this one
    mask[1, :10] = False
    check(tiny("llama"), ids, mask)
    check(tiny("llama"), ids, torch.zeros_like(mask))


def test_labels_that_stand_where_they_are_predicted_are_those_of_the_next_token() -> None:
    """The decoder of BART alone: its own loss does not shift, so users pass labels that are shifted."""
    torch.manual_seed(0)
    check(AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", **BART)).eval())


def test_routers_losses_are_no_difference() -> None:
    check(tiny("mixtral", output_router_logits=True, router_aux_loss_coef=10.0))


class OwnLoss(nn.Module):
    """A causal model that is trained on something else: the token after the next."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("llama")

    @property
    def base_model(self) -> Any:
        return self.inner.model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = self.inner(input_ids, **kwargs)
        if labels is not None:
            output.loss = nn.functional.cross_entropy(output.logits[0, :-2], labels[0, 2:])
        return output


def test_a_causal_model_with_another_loss_is_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"the next-token loss of a text would be [\d.]+, its own is [\d.]+"):
        check(OwnLoss())


NOT_NEXT_TOKEN = {
    "masked LM": lambda: bert(BertForMaskedLM),
    # Its own loss is shifted like a causal model's, and it reads the tokens that it is to predict.
    "causal head on a bidirectional body": lambda: bert(BertLMHeadModel),
    "electra": lambda: AutoModelForMaskedLM.from_config(AutoConfig.for_model("electra", **BERT, embedding_size=16)),
    "bart": lambda: AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **BART)),
    "t5": lambda: AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **T5, decoder_start_token_id=0)),
}


@pytest.mark.parametrize("kind", NOT_NEXT_TOKEN)
def test_everything_else_is_refused(kind: str) -> None:
    model = NOT_NEXT_TOKEN[kind]().eval()
    with pytest.raises(ValueError, match=f"{type(model).__name__} is no next-token model .*: none"):
        check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["masked LM", "causal head on a bidirectional body"])
def test_a_weak_dependence_on_later_tokens_is_seen_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    """As weak as in a model that is not trained, where it is no larger than rounding."""
    with pytest.raises(ValueError, match="its logits depend on later tokens"):
        check(NOT_NEXT_TOKEN[kind]().to(dtype))


def test_experts_that_round_otherwise_beside_other_tokens_are_no_dependence() -> None:
    class Rounds(nn.Module):
        """A causal model whose logits change by what rounding may do in 16 bits when any token does."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny("llama", dtype=torch.bfloat16)

        @property
        def base_model(self) -> Any:
            return self.inner.model

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            output = self.inner(input_ids, **kwargs)
            output.logits = output.logits * (1 + 0.008 * (input_ids[0, -1] % 2))
            return output

    ids = tokens(1, 24)
    ids[0, 12], ids[0, -1] = 8, 9
    check(Rounds(), ids)


def test_a_decoder_made_of_bert_is_one() -> None:
    check(bert(BertLMHeadModel, is_decoder=True))


def test_a_masked_lm_is_refused_before_calibration_by_methods_that_read_the_loss(tmp_path: Path) -> None:
    model = trained_bert()
    ids = tokens(16, 24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for settings in ({"method": "global"}, {"method": "svd_llm_v2", "allocation": "dobi_fixed_basis"}):
        quantizer = DobiSVDQuantizer(**settings, ratio=0.8, dataset=ids, statistics=str(tmp_path / "store"))
        with pytest.raises(ValueError, match=r"BertForMaskedLM is no next-token .*next-token loss.*svd_llm_v2"):
            quantizer.quantize_model(model)
        assert not (tmp_path / "store").exists()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_masked_lm_is_compressed_by_a_method_that_reads_none() -> None:
    model = bert(BertForMaskedLM)
    DobiSVDQuantizer(method="svd_llm_v2", ratio=0.8, dataset=tokens(16, 24)).quantize_model(model)
    assert model.dobisvd_report is not None


def test_the_message_has_both_losses_of_a_trained_masked_lm() -> None:
    with pytest.raises(ValueError, match=r"loss of a text would be \d+\.\d+, its own is 0\.0\d+") as told:
        check(trained_bert())
    assert "\n" not in str(told.value)


def test_perplexity_of_a_masked_lm_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no next-token model .*perplexity is of predictions of the next token"):
        perplexity(bert(BertForMaskedLM), tiny_tokenizer, "The dog ran over the hill. " * 40, seqlen=16)


def test_the_model_is_given_back_as_it_was() -> None:
    model = tiny("llama")
    model.train()
    model.config.use_cache = True
    check(model)
    assert model.training
    assert model.config.use_cache
    assert all(parameter.grad is None for parameter in model.parameters())
