"""Random models of a few thousand weights that are no causal language models made of one list of blocks."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

from integration_tests.tiny_models import VOCAB_SIZE

IMAGE_TOKEN = 5
_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_ENDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 0}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCAB_SIZE,
    **_ENDS,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_IMAGE = {"image_size": 8, "patch_size": 4}
_MAMBA = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": None}

# name -> (auto class, transformers' model type, its configuration)
_CONFIGS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "t5": (
        AutoModelForSeq2SeqLM,
        "t5",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 1,
            "eos_token_id": 0,
            "decoder_start_token_id": 1,
        },
    ),
    "bart": (AutoModelForSeq2SeqLM, "bart", {**_SEQ2SEQ, "max_position_embeddings": 128}),
    "whisper": (
        AutoModelForSpeechSeq2Seq,
        "whisper",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64},
    ),
    "vit": (AutoModelForImageClassification, "vit", {**_TOWER, **_IMAGE, "num_labels": 4}),
    "clip": (
        AutoModel,
        "clip",
        {
            "text_config": {"vocab_size": VOCAB_SIZE, **_TOWER, "max_position_embeddings": 32, "eos_token_id": 0},
            "vision_config": {**_TOWER, **_IMAGE},
            "projection_dim": 16,
        },
    ),
    "llava": (
        AutoModelForImageTextToText,
        "llava",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_TOWER, **_IMAGE, "projection_dim": 32},
            "image_token_index": IMAGE_TOKEN,
            "image_seq_length": 4,
            "vision_feature_layer": -1,
        },
    ),
    "qwen2_vl": (
        AutoModelForImageTextToText,
        "qwen2_vl",
        {
            "text_config": {**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
            | {"patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2},
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
    ),
    "gemma3": (
        AutoModelForImageTextToText,
        "gemma3",
        {
            "text_config": {**_TEXT, "query_pre_attn_scalar": 8, "sliding_window": 16},
            "vision_config": {**_TOWER, **_IMAGE, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
    ),
    "falcon": (
        AutoModelForCausalLM,
        "falcon",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "mamba": (AutoModelForCausalLM, "mamba", {**_MAMBA, "state_size": 4, "time_step_rank": 4, "eos_token_id": 0}),
    "jamba": (
        AutoModelForCausalLM,
        "jamba",
        {**_TEXT, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 8}
        | {"expert_layer_offset": 7, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
}


def tiny_architecture(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of an architecture with random weights, in evaluation mode; `overrides` are fields of its config."""
    auto_class, model_type, settings = _CONFIGS[name]
    torch.manual_seed(seed)
    model: PreTrainedModel = auto_class.from_config(AutoConfig.for_model(model_type, **{**settings, **overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
    return model.eval()


def image_text_batches(name: str, count: int, length: int = 12, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """What a processor gives for texts with an image each: a batch of one row for each, four tokens the image."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(10, VOCAB_SIZE, (1, length), generator=generator)
        ids[0, 1:5] = IMAGE_TOKEN
        pixels = torch.randn(1, 3, 8, 8, generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        if name == "qwen2_vl":  # patches in a row, and how many of them there are in time, height and width
            batch["pixel_values"] = torch.randn(16, 3 * 4 * 4, generator=generator)
            batch["image_grid_thw"] = torch.tensor([[1, 4, 4]])
            batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
        if name == "gemma3":
            batch["token_type_ids"] = (ids == IMAGE_TOKEN).long()
        batches.append(batch)
    return batches
