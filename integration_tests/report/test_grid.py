"""Names of modules into layers and types."""

import pytest

from integration_tests.report.made_up_reports import EXPERTS, GPT2, LLAMA, NEOX, OPT, Kind, made_up
from optimum_dobisvd.report.grid import grid_of


@pytest.mark.parametrize(
    ("kinds", "types"),
    [
        (LLAMA, ["q_proj", "k_proj", "up_proj", "down_proj"]),
        (GPT2, ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
        (NEOX, ["query_key_value", "dense", "dense_h_to_4h"]),
        (OPT, ["out_proj", "fc1", "fc2"]),
        (EXPERTS, ["o_proj", "experts.*.up_proj", "shared_experts.up_proj"]),
    ],
)
def test_types_are_as_short_as_can_be_and_layers_are_numbers(kinds: list[Kind], types: list[str]) -> None:
    report = made_up(kinds, layers=12)
    grid = grid_of(report.modules)
    assert grid.types == types
    assert grid.layers == list(range(12)), "sorted as numbers, not as words"
    assert sum(len(found) for found in grid.cells.values()) == len(report.modules)
    assert [module for kind in grid.types for module in grid.of_type(kind)] == sorted(
        report.modules, key=lambda module: next(i for i, kind in enumerate(grid.types) if module in grid.of_type(kind))
    )


def test_experts_share_a_cell() -> None:
    grid = grid_of(made_up(EXPERTS).modules)
    assert [module.name for module in grid.cells["experts.*.up_proj", 2]] == [
        f"model.layers.2.mlp.experts.{expert}.up_proj" for expert in range(3)
    ]


def test_a_name_without_a_number_is_layer_0() -> None:
    grid = grid_of(made_up([("encoder.proj", 8, 8)], layers=1).modules)
    assert (grid.types, grid.layers) == (["proj"], [0])
