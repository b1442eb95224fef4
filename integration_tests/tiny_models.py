"""Random models of a few thousand weights, one per architecture: `tiny("llama")`. Same seed, same weights; no hub."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 300  # that of the `tiny_tokenizer` fixture

_LLAMA_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

# name -> (transformers' model type, what its configuration differs in from the defaults)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "llama_tied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 8}),
    "gemma": ("gemma", {**_LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": True}),
    # Two kinds of blocks by turns, with a sliding and with a full mask.
    "gemma2": (
        "gemma2",
        {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    ),
    # And here with rotary embeddings of their own, too.
    "gemma3_text": (
        "gemma3_text",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
        },
    ),
    "phi": ("phi", {**_LLAMA_LIKE, "num_key_value_heads": 4}),
    "opt": (
        "opt",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 32,
            "n_inner": 48,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    # Hidden states in four streams (AltUp): `4 x batch x seqlen x width`.
    "gemma3n_text": (
        "gemma3n_text",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "altup_num_inputs": 4,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0] * 3,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "pad_token_id": 1,
            "tie_word_embeddings": True,
        },
    ),
    # A mixture of experts: they sit in fused three-dimensional tensors, only the attention is made of linears.
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
}

_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": _CONFIGS["mixtral"],
    "qwen3_moe": (
        "qwen3_moe",
        {**_LLAMA_LIKE, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    # Its first block has no experts; the others have a shared one, too.
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_LLAMA_LIKE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    # Transposed weights, gate and up interleaved, biases.
    "gpt_oss": (
        "gpt_oss",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    # Transposed weights; experts are given all tokens, those of others as zeros.
    "llama4_text": (
        "llama4_text",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
    # Experts without a gate, among blocks of other kinds.
    "nemotron_h": (
        "nemotron_h",
        {
            **_LLAMA_LIKE,
            "head_dim": 8,
            "layers_block_type": ["attention", "moe", "attention"],
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_hidden_act": "relu2",
        },
    ),
    # Rows sorted by expert, for a stack of one matrix each; in the attention, too.
    "jetmoe": ("jetmoe", {**_LLAMA_LIKE, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}

UNUSUAL = ("gemma3n_text",)
"""Models whose blocks have more than attention and a feed-forward part."""

MODEL_TYPES = tuple(name for name in _CONFIGS if name not in UNUSUAL)
MIXTURE_TYPES = tuple(_MIXTURES)


def tiny(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A causal language model with random weights, in evaluation mode.

    Its weights are larger than transformers' own initialization, and biases and norms are random as well: with tiny
    weights and zero biases, a block that ignored half its inputs would give much the same outputs.

    Args:
        model_type: one of `MODEL_TYPES`, `MIXTURE_TYPES` or `UNUSUAL`.
        seed: of the weights.
        dtype: of the weights; they are drawn in float32 and rounded.
        overrides: fields of the configuration, by transformers' names.
    """
    name, settings = (_CONFIGS | _MIXTURES)[model_type]
    config = AutoConfig.for_model(name, **{**settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some models draw vectors, too
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
            else:
                parameter.copy_(parameter + 0.1 * noise)
    return model.to(dtype).eval()


def tokens(count: int, length: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Random token ids, `count x length`, int64. Token 0 (the end of text) and 1 (padding) do not occur."""
    return torch.randint(2, vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))
