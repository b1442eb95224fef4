"""The picture of kept directions: drawn, and true to the plan."""

import math
from pathlib import Path

import pytest

from integration_tests.report.test_training_pictures import pixels
from optimum_dobisvd.allocation.plan import Plan, PlannedModule
from optimum_dobisvd.report.directions_picture import chooses_directions, directions_picture, kept_by_place

DENSE = PlannedModule("dense", "float")
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]


def low_rank(rank: int, directions: tuple[int, ...] | None = None) -> PlannedModule:
    return PlannedModule("low_rank", "float", rank, directions)


def plan_of(module: PlannedModule) -> Plan:
    modules = {**dict.fromkeys(NAMES, module), NAMES[0]: DENSE}
    return Plan(modules, method="global", ratio=0.5, allocation="dobi_fixed_basis", basis="0123")


def test_truncation_is_an_edge_at_the_rank() -> None:
    found = kept_by_place([(low_rank(40), 100), (low_rank(80), 200)])
    assert found[:20] == [1.0] * 20
    assert found[20:] == [0.0] * 20


def test_kept_directions_are_counted_where_they_lie() -> None:
    found = kept_by_place([(low_rank(20, (*range(19), 30)), 100)])
    assert found[18:21] == [1.0, 0.0, 0.0]
    assert found[30] == 1.0
    assert sum(found) == 20


def test_places_without_a_direction_are_blank() -> None:
    found = kept_by_place([(low_rank(30), 32)])
    assert all(math.isnan(share) for share in found[22:])
    assert sum(math.isnan(share) for share in kept_by_place([(low_rank(4), 8)])) == 32


def test_it_is_drawn_for_every_type(tmp_path: Path) -> None:
    plan = plan_of(low_rank(4, (0, 1, 2, 6)))
    assert chooses_directions(plan)
    assert not chooses_directions(plan_of(low_rank(4)))
    image = pixels(directions_picture(plan, dict.fromkeys(NAMES, 16), tmp_path / "new" / "p.png"))
    assert 150 < image.shape[0] < 3000
    dense = Plan(dict.fromkeys(NAMES, DENSE), method="m", ratio=None, allocation="a")
    with pytest.raises(ValueError, match="no matrix of the plan is low-rank"):
        directions_picture(dense, dict.fromkeys(NAMES, 16), tmp_path / "q.png")
