"""Every architecture of transformers that a tiny random model can be made of, compressed, saved and reloaded: a table.

    python recipes/benchmarks/architectures.py [--out recipes/ARCHITECTURES.md] [--results DIR/rows.jsonl] [NAME ...]

A row is one model class. Its configuration is transformers' default with small sizes; nothing else is said about an
architecture here but what `SPECIAL` lists. Rows go to the results as they are finished, and rows that are there for
the same transformers and the same state of this package are not made again, so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import multiprocessing
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import optimum_dobisvd
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer

# The auto classes, and what a row of theirs is called. A family is taken from the first that knows it as that.
KINDS = {
    "AutoModelForCausalLM": "causal",
    "AutoModelForSeq2SeqLM": "encoder-decoder",
    "AutoModelForImageTextToText": "image and text",
    "AutoModelForSpeechSeq2Seq": "speech to text",
    "AutoModelForMaskedLM": "encoder",
    "AutoModelForImageClassification": "image encoder",
}
METHODS = ("svd", "svd_llm_v2", "global")
LARGEST, WIDEST = 5_000_000, 1024
"""Parameters of a model that counts as tiny, and inputs of its linears; a larger one was not made so by its sizes."""
SECONDS = 60

# Sizes by the names that configurations have for them. What a configuration lacks is not set.
_SIZES: dict[int, str] = {
    1: "n_group topk_group num_shared_experts n_shared_experts first_k_dense_replace decoder_sparse_step "
    "attn_layer_offset interleave_moe_layer_step encoder_sparse_step num_nextn_predict_layers",
    2: "encoder_layers decoder_layers depth num_experts_per_tok top_k moe_top_k moe_topk moe_k num_experts_per_token "
    "spatial_merge_size mamba_n_groups n_groups num_hidden_groups attn_layer_period expert_layer_period",
    4: "num_hidden_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers "
    "encoder_num_hidden_layers decoder_num_hidden_layers num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads heads patch_size decoder_attention_heads encoder_num_attention_heads "
    "decoder_num_attention_heads num_key_value_heads num_kv_heads n_head_kv num_global_key_value_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts mamba_d_state mm_tokens_per_image "
    "image_seq_length state_size time_step_rank ssm_state_size mamba_dt_rank linear_num_key_heads "
    "linear_num_value_heads rotary_dim",
    8: "head_dim d_kv kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim attention_head_dim global_head_dim "
    "image_size num_mel_bins linear_key_head_dim linear_value_head_dim sliding_window hidden_size_per_layer_input "
    "query_pre_attn_scalar index_head_dim attention_window mamba_n_heads",
    16: "q_lora_rank kv_lora_rank max_source_positions mamba_d_head",
    32: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size projection_dim lru_width "
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size text_hidden_size "
    "out_hidden_size moe_shared_expert_intermediate_size cross_hidden_size attention_hidden_size",
    64: "intermediate_size d_ff ffn_dim n_inner ffn_hidden_size hidden_dim encoder_ffn_dim decoder_ffn_dim "
    "intermediate_size_mlp mlp_hidden_size shared_intermediate_size mamba_intermediate_size",
    128: "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions",
    300: "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size text_vocab_size entity_vocab_size",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 0, "sep_token_id": 2}
STAND_INS = ("image", "video", "audio", "vision", "boi", "eoi", "boa", "eoa", "media")
_THREE_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict[str, Any]] = {
    **{
        f"{family}{suffix}": {"rope_parameters": _THREE_AXES}
        for family in ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga", "paddleocr_vl")
        for suffix in ("", "_text")
    },
    "qwen2_5_omni_text": {"rope_parameters": _THREE_AXES},
    **{name: {"rope_parameters": _PLAIN} for name in ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")},
    "dots1": {"sliding_window": None},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [8, 24]},
    "rwkv": {"attention_hidden_size": 32},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
}
"""What some configurations need beside, by model type."""


class Late(BaseException):
    """A row took longer than it may. No `Exception`, of which a row is made."""


def tiny_settings(config: Any) -> dict[str, Any]:
    """Return the arguments that make a configuration like this a tiny one."""
    settings: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = getattr(config, name, None) if isinstance(value, dict) else None
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):
            settings[name] = {"model_type": part.model_type, **tiny_settings(part)}
        elif name in TOKENS:
            settings[name] = TOKENS[name]
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            settings[name] = SIZES[name]
        elif name.startswith(STAND_INS) and name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            settings[name] = 290 + len(settings) % 9
        elif name in ("rope_scaling", "rope_parameters") and isinstance(value, dict) and "mrope_section" in value:
            settings[name] = {**value, "mrope_section": [1, 1, 2]}
    return settings | SPECIAL.get(config.model_type, {})


def families() -> dict[str, tuple[str, type]]:
    """Return, by model type, the auto class and the configuration class of every family."""
    found: dict[str, tuple[str, type]] = {}
    for auto in KINDS:
        for config_class in getattr(modeling_auto, auto)._model_mapping:
            model_type = config_class.model_type
            if model_type and model_type not in found and not _is_better_elsewhere(auto, config_class):
                found[model_type] = auto, config_class
    return found


def _is_better_elsewhere(auto: str, config_class: type) -> bool:
    """Whether a causal class is one half of a model, a mask on an encoder, or a part of what reads images."""
    others = [name for name in KINDS if name not in ("AutoModelForCausalLM", "AutoModelForImageClassification")]
    return auto == "AutoModelForCausalLM" and any(
        config_class in getattr(modeling_auto, other)._model_mapping for other in others
    )


def tiny_model(auto: str, config_class: Any) -> Any:
    """Return a model with random weights. ValueError if it is not tiny."""
    config = config_class(**tiny_settings(config_class()))
    auto_class = getattr(transformers, auto)
    with torch.device("meta"):
        shapes = auto_class.from_config(config)
    count = sum(parameter.numel() for parameter in shapes.parameters())
    width = max((each.in_features for each in shapes.modules() if isinstance(each, nn.Linear)), default=0)
    if count > LARGEST or width > WIDEST:
        raise ValueError(f"{count:,} parameters, linears of up to {width:,} inputs: its sizes have other names")
    torch.manual_seed(0)
    model = auto_class.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and parameter.requires_grad:  # others are computed, and not saved
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def data_for(model: nn.Module) -> Any:
    """Return calibration tokens; rows of a batch for a model that takes something else."""
    generator = torch.Generator().manual_seed(0)
    wanted = getattr(model, "main_input_name", "input_ids")
    ids = torch.randint(3, 280, (8, 16), generator=generator)
    if wanted == "input_ids":
        return ids
    config: Any = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 8)
    height, width = (size, size) if isinstance(size, int) else size
    shapes = {
        "pixel_values": (1, getattr(vision, "num_channels", 3), height, width),
        "input_features": (1, getattr(config, "num_mel_bins", 8), 2 * getattr(config, "max_source_positions", 16)),
    }
    if wanted not in shapes:
        return ids
    rows = [{wanted: torch.randn(shapes[wanted], generator=generator)} for _ in range(8)]
    takes_ids = hasattr(config, "text_config") and not config.is_encoder_decoder
    extra = "input_ids" if takes_ids else "labels" if config.is_encoder_decoder else None
    return rows if extra is None else [{**row, extra: each[None]} for row, each in zip(rows, ids, strict=True)]


def example_for(model: Any, data: Any) -> dict[str, Tensor]:
    """Return inputs to compare outputs on."""
    if isinstance(data, list):
        example = dict(data[0])
        if "labels" in example:
            example["decoder_input_ids"] = example.pop("labels")
        return example
    inputs = {"input_ids": data[:2]}
    return inputs | ({"decoder_input_ids": data[:2, :6]} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def output_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the first tensor that a model gives."""
    values = model(**inputs)
    return next(value for value in values.values() if isinstance(value, Tensor)).contiguous()


def reload(auto: str, folder: str, inputs: dict[str, Tensor], expected: Tensor) -> bool:
    """Whether the checkpoint gives that output, bit for bit; in another process than the one that made it."""
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    return torch.equal(output_of(model, inputs), expected)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `Late` inside after that many seconds."""

    def late(_number: int, _frame: Any) -> None:
        raise Late(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def row_of(model_type: str, auto: str, config_class: type, pool: Any) -> dict[str, Any]:
    """Compress one family by every method; returns its row."""
    row: dict[str, Any] = {"model_type": model_type, "kind": KINDS[auto], "methods": [], "refused": {}}
    try:
        model = tiny_model(auto, config_class)
        data = data_for(model)
        example = example_for(model, data)
        output_of(model, example)
    except Exception as error:
        return {**row, "not_made": _sentence(error)}
    compressed: Any = None
    for method in METHODS:
        model = tiny_model(auto, config_class)
        config = DobiSVDConfig(method=method, ratio=0.6, dataset=data, nsamples=8, min_coverage=0.0)
        try:
            compressed = DobiSVDQuantizer(config).quantize_model(model)
        except Exception as error:
            row["refused"][method] = _sentence(error)
        else:
            row["methods"].append(method)
    if compressed is None:
        return row
    report = compressed.dobisvd_report
    row |= {"coverage": report.coverage, "left_dense": report.left_dense, "exact": False}
    try:
        row["exact"] = _reloads(compressed, auto, example, pool)
    except Exception as error:
        row["refused"]["reload"] = _sentence(error)
    if not row["exact"]:
        try:
            alike = _reloads(tiny_model(auto, config_class), auto, example, pool)
        except Exception:
            alike = False
        if not alike:
            row["refused"]["reload of the dense model"] = "transformers does not give it back bit for bit either"
    return row


def _reloads(model: Any, auto: str, example: dict[str, Tensor], pool: Any) -> bool:
    """Whether another process gets the same outputs from the saved model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return bool(pool.apply_async(reload, (auto, folder, example, output_of(model, example))).get(SECONDS))


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def state_of_the_package() -> str:
    """Return a digest of transformers' version and of this package's code."""
    digest = hashlib.sha256(transformers.__version__.encode())
    for path in sorted(Path(optimum_dobisvd.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table, and the families of which no tiny model could be made."""
    made = [row for row in rows if "not_made" not in row]
    whole = [row for row in made if row["methods"]]
    lines = [
        "# Architectures",
        "",
        "Made by `python recipes/benchmarks/architectures.py` (transformers "
        f"{transformers.__version__}): a tiny random model of every family that one can be made of by setting sizes "
        "alone, compressed to 60 %, saved, and loaded by another process.",
        "",
        f"{len(made)} families; {len(whole)} are compressed by some method, "
        f"{sum(row['methods'] == list(METHODS) for row in made)} by `svd`, `svd_llm_v2` and `global` alike, and "
        f"{sum(bool(row.get('exact')) for row in whole)} of the {len(whole)} reload bit for bit. In tiny "
        "models what is no linear (convolutions, states, projectors) weighs more than in real ones.",
        "",
        "| family | kind | share of the linears | reload exact | methods | left dense, or refused, and why |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(made, key=lambda row: (list(KINDS.values()).index(row["kind"]), row["model_type"])):
        share = f"{row['coverage']:.1%}" if "coverage" in row else "–"
        exact = "–" if "exact" not in row else "yes" if row["exact"] else "**no**"
        left = row.get("left_dense", "nothing")
        reasons = dict.fromkeys(row["refused"].values())
        told = [f"{', '.join(m for m, r in row['refused'].items() if r == why)}: {why}" for why in reasons]
        why = "; ".join(([] if left == "nothing" else [left]) + told).replace("|", "\\|")
        methods = "all" if row["methods"] == list(METHODS) else ", ".join(row["methods"]) or "none"
        lines.append(f"| `{row['model_type']}` | {row['kind']} | {share} | {exact} | {methods} | {why} |")
    missing = sorted(row["model_type"] for row in rows if "not_made" in row)
    waiting = sorted(families().keys() - {row["model_type"] for row in rows})
    lines += ["", f"Not made tiny by sizes alone, and so not tried ({len(missing)}): {', '.join(missing) or 'none'}."]
    lines += [f"No row yet ({len(waiting)}): {', '.join(waiting)}."] if waiting else []
    return "\n".join([*lines, ""])


def main() -> None:
    """Make the rows that are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families to make rows of (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "ARCHITECTURES.md")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "architectures.jsonl")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    state = state_of_the_package()
    stored = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    rows = {row["model_type"]: row for row in stored if row["state"] == state}
    known = families()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for name in args.names or known:
            if name in rows:
                continue
            auto, config_class = known[name]
            try:
                with time_limit(SECONDS):
                    row = row_of(name, auto, config_class, pool)
            except Late as error:
                row = {"model_type": name, "kind": KINDS[auto], "methods": [], "refused": {"all": str(error)}}
            rows[name] = {**row, "state": state}
            with args.results.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
            print(
                name, row.get("not_made") or f"{row['methods']} {row.get('exact')} {row.get('coverage')}", flush=True
            )
            args.out.write_text(markdown(list(rows.values())), encoding="utf-8")
    args.out.write_text(markdown(list(rows.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
