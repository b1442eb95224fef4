"""A report of what is known without a run: shapes, ranks, bytes and arithmetic; no errors, no times."""

from __future__ import annotations

from torch import nn

from ..config import DobiSVDConfig
from ..model.footprint import macs_per_token
from ..model.layout import Layout
from ..report.report import CompressionReport, ModuleReport


def dry_run_report(
    name: str,
    config: DobiSVDConfig,
    meta_model: nn.Module,
    layout: Layout,
    rows: list[ModuleReport],
    dense_model_bytes: int,
) -> CompressionReport:
    """Put the report together.

    Args:
        name: what the model is called.
        config: the compression.
        meta_model: the dense model on meta.
        layout: its targets.
        rows: one for every target.
        dense_model_bytes: of the dense checkpoint.
    """
    dense_macs = macs_per_token(meta_model)
    saved_macs = sum(row.out_features * row.in_features - row.macs for row in rows)
    return CompressionReport(
        model=name,
        method=config.method,
        ratio=config.ratio,
        dataset=None if config.dataset is None else {"dataset": config.dataset},
        modules=rows,
        coverage=layout.coverage,
        left_dense=layout.describe_left_dense(),
        dense_macs=dense_macs,
        compressed_macs=dense_macs - saved_macs,
        dense_model_bytes=dense_model_bytes,
        compressed_model_bytes=dense_model_bytes - sum(row.dense_bytes - row.bytes for row in rows),
    )
