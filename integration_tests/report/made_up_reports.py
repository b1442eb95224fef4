"""Reports of models that never were, with the module names of real architectures."""

from __future__ import annotations

from collections.abc import Sequence

from optimum_dobisvd.report.report import CompressionReport, ModuleReport

Kind = tuple[str, int, int]  # name with {l} for the layer, m, n

LLAMA: list[Kind] = [
    ("model.layers.{l}.self_attn.q_proj", 64, 64),
    ("model.layers.{l}.self_attn.k_proj", 16, 64),
    ("model.layers.{l}.mlp.up_proj", 128, 64),
    ("model.layers.{l}.mlp.down_proj", 64, 128),
]
GPT2: list[Kind] = [
    ("transformer.h.{l}.attn.c_attn", 192, 64),
    ("transformer.h.{l}.attn.c_proj", 64, 64),
    ("transformer.h.{l}.mlp.c_fc", 256, 64),
    ("transformer.h.{l}.mlp.c_proj", 64, 256),
]
NEOX: list[Kind] = [
    ("gpt_neox.layers.{l}.attention.query_key_value", 192, 64),
    ("gpt_neox.layers.{l}.attention.dense", 64, 64),
    ("gpt_neox.layers.{l}.mlp.dense_h_to_4h", 256, 64),
]
OPT: list[Kind] = [
    ("model.decoder.layers.{l}.self_attn.out_proj", 64, 64),
    ("model.decoder.layers.{l}.fc1", 256, 64),
    ("model.decoder.layers.{l}.fc2", 64, 256),
]
EXPERTS: list[Kind] = [
    ("model.layers.{l}.self_attn.o_proj", 64, 64),
    *((f"model.layers.{{l}}.mlp.experts.{e}.up_proj", 128, 64) for e in range(3)),
    ("model.layers.{l}.mlp.shared_experts.up_proj", 128, 64),
]


def made_up(
    kinds: Sequence[Kind] = LLAMA, layers: int = 3, *, dense: Sequence[str] = (), errors: bool = True
) -> CompressionReport:
    """A report with ranks and errors that differ by layer and type; `dense` names the matrices left as they were."""
    modules = []
    for layer in range(layers):
        for place, (pattern, m, n) in enumerate(kinds):
            name = pattern.format(l=layer)
            rank = None if name in dense else 1 + (7 * layer + 3 * place) % (m * n // (m + n) - 1)
            size = 2 * (m * n if rank is None else rank * (m + n))
            error = 0.0 if rank is None else 0.05 + 0.01 * layer + 0.002 * place
            structure = "dense" if rank is None else "low_rank"
            found = error if errors else None
            modules.append(ModuleReport(name, m, n, structure, rank, "float", size, 2 * m * n, found))
    return CompressionReport(
        model="made-up",
        method="svd_llm_v2",
        ratio=0.8,
        dataset={"dataset": "text.txt"},
        modules=modules,
        coverage=0.9,
        left_dense="12 parameters in Router",
        dense_macs=2_000_000,
        compressed_macs=1_500_000,
        dense_model_bytes=3_000_000,
        compressed_model_bytes=2_400_000,
        seconds={"statistics": 61.25, "factorization": 3.5},
        peak_bytes={"statistics": 123_000_000},
        perplexity={"wikitext2": {"dense": 20.0, "compressed": 25.0}},
    )
