"""The tables say what the report holds."""

import io
from dataclasses import replace

from rich.console import Console

from integration_tests.report.made_up_reports import GPT2, made_up
from optimum_dobisvd.report.report import CompressionReport
from optimum_dobisvd.report.table import bytes_text, count_text, print_report, ratio_text


def printed(report: CompressionReport, modules: bool = False) -> list[str]:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=119, markup=False, highlight=False), modules=modules)
    return stream.getvalue().splitlines()


def row(lines: list[str], start: str) -> list[str]:
    (found,) = [line for line in lines if line.strip().startswith(start)]
    return found.replace(start, "", 1).split()


def test_the_summary_has_bytes_arithmetic_and_perplexity() -> None:
    report = made_up()
    lines = printed(report)
    assert row(lines, "whole checkpoint") == ["3.00", "MB", "2.40", "MB", "0.8000"]
    assert row(lines, "FLOPs per token") == ["4.00", "M", "3.00", "M", "0.7500"]
    assert row(lines, "perplexity, wikitext2") == ["20.00", "25.00", "1.25"]
    assert row(lines, "target matrices")[-1] == f"{report.target_bytes / report.dense_target_bytes:.4f}"
    assert row(lines, "statistics") == ["61.2", "123", "MB"]
    assert row(lines, "factorization") == ["3.5"]
    assert "90.0%" in lines[-1]
    assert "12 parameters in Router" in lines[-1]


def test_types_are_summed_up() -> None:
    report = made_up(GPT2, 4, dense=["transformer.h.2.mlp.c_proj"])
    lines = printed(report)
    found = [module for module in report.modules if module.name.endswith("mlp.c_proj")]
    ranks = [module.rank for module in found if module.rank is not None]
    errors = [module.error for module in found if module.rank is not None and module.error is not None]
    cells = row(lines, "mlp.c_proj")
    assert cells[:7] == ["4", "3", "low_rank,", "1", "as", "is", "64×256"]
    assert cells[7] == f"{min(ranks)}-{max(ranks)}"
    assert cells[-2:] == [f"{sum(errors) / 3:.2%}", f"{max(errors):.2%}"], "the dense one has no error to average"


def test_matrices_are_counted_by_structure_and_encoding() -> None:
    names = [f"transformer.h.{layer}.mlp.c_proj" for layer in range(3)]
    report = made_up(GPT2, 4, dense=names)
    report.modules = [
        replace(module, encoding="int8") if module.name in names[:2] else module for module in report.modules
    ]
    assert row(printed(report), "mlp.c_proj")[:6] == ["4", "2", "dense", "int8,", "1", "as"]


def test_every_matrix_is_listed_on_demand() -> None:
    report = made_up(dense=["model.layers.1.mlp.up_proj"])
    lines = printed(report, modules=True)
    assert row(lines, "model.layers.1.mlp.up_proj")[:3] == ["128×64", "dense", "float"]
    for module in report.modules:
        if module.rank is not None:
            assert row(lines, module.name)[1:4] == ["low_rank", str(module.rank), "float"]
        assert any(module.name in line for line in lines)
        assert not any(module.name in line for line in printed(report))


def test_what_is_unknown_is_left_empty() -> None:
    report = made_up(errors=False)
    report.seconds, report.peak_bytes, report.perplexity = {}, {}, {"c4": {"compressed": 9.5}}
    lines = printed(report, modules=True)
    assert row(lines, "perplexity, c4") == ["9.50"]
    assert not any("peak memory" in line for line in lines)


def test_numbers_for_people() -> None:
    assert [bytes_text(n) for n in (0, 999, 1000, 12_345, 999_999, 5_000_000_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "12.3 kB",
        "1.00 MB",
        "5.00 GB",
    ]
    assert [count_text(n) for n in (7, 1_500, 2.5e13)] == ["7", "1.50 k", "25.0 T"]
    assert ratio_text(1, 3) == "0.3333"
    assert ratio_text(1, 0) == ""
