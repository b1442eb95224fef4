"""How much text a model can read is found without weights: by its own code, on shapes."""

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from integration_tests.tiny_models import VOCAB_SIZE, tiny
from optimum_dobisvd.model.input_limits import default_seqlen, position_limit, require_positions, token_limit

# Positions looked up in a table: of parameters, of a sine, with rows in front, in masks, in a product of shapes.
TABLES = {
    "gpt2": 128,
    "opt": 128,
    "gptj": 64,
    "gpt_neo": 64,
    "codegen": 64,
    "mpt": 64,
    "gpt_bigcode": 64,
    "biogpt": 64,
    "ctrl": 64,
    "openai-gpt": 64,
    "bert": 64,
    "roberta": 62,
}
BEYOND = ["llama", "gemma2", "gemma3_text", "phi", "gpt_neox", "mixtral", "bloom", "falcon", "xglm"]
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_neo": {
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "codegen": {**_GPT, "rotary_dim": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "gpt_bigcode": _GPT,
    "biogpt": {**_BERT, "max_position_embeddings": 64},
    "ctrl": {**_GPT, "dff": 32},
    "openai-gpt": _GPT,
    "bert": {**_BERT, "max_position_embeddings": 64, "is_decoder": True},
    "roberta": {**_BERT, "max_position_embeddings": 64, "is_decoder": True, "pad_token_id": 1},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64},
    "xglm": {"max_position_embeddings": 64, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 32},
}


def on_meta(model_type: str) -> Any:
    with torch.device("meta"):
        if model_type not in CONFIGS:
            return AutoModelForCausalLM.from_config(tiny(model_type).config)
        config = AutoConfig.for_model(model_type, vocab_size=VOCAB_SIZE, **CONFIGS[model_type])
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", TABLES)
def test_a_table_of_positions_ends(model_type: str) -> None:
    limit = TABLES[model_type]
    model = on_meta(model_type)
    assert position_limit(model, 2048) == limit
    assert position_limit(model, limit) is None
    assert position_limit(model, limit + 1) == limit
    assert default_seqlen(model, 2048) == limit
    assert default_seqlen(model, limit - 3) == limit - 3
    assert token_limit(model) == VOCAB_SIZE
    real = model.to_empty(device="cpu").eval()  # the right answer is what the model does
    for parameter in [*real.parameters(), *real.buffers()]:
        parameter.data.zero_()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        real(input_ids=torch.full((1, limit + 1), 5), attention_mask=torch.ones(1, limit + 1, dtype=torch.long))


@pytest.mark.parametrize("model_type", BEYOND)
def test_other_positions_do_not_end_where_they_were_trained(model_type: str, caplog: Any) -> None:
    model = on_meta(model_type)
    assert position_limit(model, 300) is None
    declared = getattr(model.config, "max_position_embeddings", None)
    assert default_seqlen(model, 2048) == min(2048, declared or 2048)
    with caplog.at_level(logging.WARNING):
        require_positions(model, 300, "seqlen=300 was asked for")
    assert (f"was made for {declared} positions" in caplog.text) == (declared is not None)


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, window: int = 40, hidden_size: int = 16, vocab_size: int = 50, **rest: Any) -> None:
        super().__init__(**rest)
        self.window, self.hidden_size, self.vocab_size = window, hidden_size, vocab_size


class OwnModel(PreTrainedModel):
    """A model of nobody's library: its configuration calls its positions what it likes."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.window, config.hidden_size)
        self.layers = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, use_cache: bool = False) -> torch.Tensor:
        hidden = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            hidden = hidden + layer(hidden).relu()
        return hidden @ self.words.weight.T


def test_no_name_of_a_setting_is_needed() -> None:
    model = OwnModel(OwnConfig())
    assert position_limit(model, 2048) == 40
    assert default_seqlen(model, 2048) == 40
    assert token_limit(model) == 50


def test_what_cannot_be_run_on_shapes_is_left_alone() -> None:
    assert position_limit(nn.Linear(3, 3), 2048) is None
    assert default_seqlen(nn.Linear(3, 3), 2048) == 2048
    assert token_limit(nn.Linear(3, 3)) is None
