"""The plan file: what is written comes back, and a mistake in it is named."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration_tests.allocation.budget_cases import LEFT_AS_IS, low_rank
from optimum_dobisvd.allocation.plan import Plan, PlannedModule
from optimum_dobisvd.model.target import Target

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
TARGETS = [Target(Q, 64, 64, 2), Target(K, 16, 64, 2)]
PLAN = Plan({Q: low_rank(12), K: LEFT_AS_IS}, method="dobi", ratio=0.8, allocation="uniform")


def pivoted(rank: int, encoding: str = "float", **kwargs: Any) -> PlannedModule:
    return PlannedModule("pivoted", encoding, rank, **kwargs)


modules = st.dictionaries(
    st.text(min_size=1),
    st.one_of(
        st.sampled_from(["float", "int8", "gptq4_g32", "nf4"]).map(lambda encoding: PlannedModule("dense", encoding)),
        st.builds(low_rank, st.integers(1, 10**6), st.sampled_from(["float", "remap", "int8", "gptq4_g32", "nf4_dq"])),
        st.builds(pivoted, st.integers(1, 10**6), st.sampled_from(["float", "int8", "gptq4_g32", "nf4_dq"])),
        st.sets(st.integers(0, 60), min_size=1).map(lambda some: low_rank(len(some), directions=tuple(sorted(some)))),
        st.sets(st.integers(0, 60), min_size=1).map(lambda some: pivoted(len(some), directions=tuple(sorted(some)))),
    ),
)
plans = st.builds(
    Plan,
    modules,
    method=st.text(min_size=1),
    ratio=st.none() | st.floats(0, 1, exclude_min=True),
    allocation=st.text(min_size=1),
    basis=st.text(min_size=1),
)


def entry(**values: Any) -> dict[str, Any]:
    """What a plan says of one module, as a person might have written it."""
    return {"structure": "low_rank", "encoding": "float", **values}


@given(plan=plans)
def test_dict_round_trip(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_file_round_trip_and_its_form(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert Plan.load(str(tmp_path / "plan.json")) == PLAN
    assert (tmp_path / "plan.json").read_text() == (
        '{\n  "format_version": 2,\n  "method": "dobi",\n  "allocation": "uniform",\n  "ratio": 0.8,\n  "modules": {\n'
        f'    "{Q}": {{"structure": "low_rank", "rank": 12, "encoding": "float"}},\n'
        f'    "{K}": {{"structure": "dense", "encoding": "float"}}\n  }}\n}}\n'
    )
    Plan({}, method="m", ratio=None, allocation="a").save(tmp_path / "empty.json")
    assert Plan.load(tmp_path / "empty.json").modules == {}


@given(plan=plans)
def test_the_written_text_is_the_dict(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    plan.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == plan.to_dict()
    assert Plan.load(path) == plan


def test_a_failed_save_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLAN.save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Plan({}, method="m", ratio=None, allocation="a").save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == before
    assert os.listdir(tmp_path) == ["plan.json"]


def test_bytes_and_ratio_count_factors_and_dense_matrices() -> None:
    assert PLAN.bytes(TARGETS) == 12 * (64 + 64) * 2 + 16 * 64 * 2
    assert PLAN.ratio_of(TARGETS) == PLAN.bytes(TARGETS) / (64 * 64 * 2 + 16 * 64 * 2)
    PLAN.check(TARGETS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "the plan has an unknown key 'extra'"),
        ({"modles": {}}, "unknown key 'modles'; near names: 'modules'; correct or remove it"),
        ({"format_version": 3}, "format_version is 3, newer than the 2 this version reads; upgrade optimum-dobisvd"),
        ({"format_version": 3, "extra": 1}, "upgrade optimum-dobisvd"),
        (
            {"format_version": 1},
            "format_version is 1, which had 'storage' where version 2 has 'structure' and 'encoding'; make the plan",
        ),
        ({"format_version": 1, "extra": 1}, "make the plan again"),
        ({"format_version": 0}, "format_version is 0; expected 2"),
        ({"format_version": True}, "format_version is True; expected 2"),
        ({"format_version": "2"}, "format_version is '2'; expected 2"),
        ({"method": None}, "method is None; it must be a name"),
        ({"allocation": ""}, "allocation is ''; it must be a name"),
        ({"ratio": 0}, "ratio is 0; it must be above 0 and at most 1, or null"),
        ({"ratio": True}, "ratio is True"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": "0.8"}, "ratio is '0.8'"),
        ({"modules": []}, r"'modules' must be a JSON object, got \[\]"),
    ],
)
def test_from_dict_is_strict_about_the_plan(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_dict(PLAN.to_dict() | change)


@pytest.mark.parametrize("key", ["format_version", "method", "allocation", "ratio", "modules"])
def test_from_dict_needs_every_key(key: str) -> None:
    data = PLAN.to_dict()
    del data[key]
    with pytest.raises(ValueError, match=f"{key} is None" if key == "format_version" else f"has no '{key}'; add it"):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (12, "must be a JSON object, got 12"),
        ({}, "has no 'structure'; add it"),
        ({"rank": 12, "structure": "low_rank"}, "has no 'encoding'; add it"),
        ({"rank": 12, "encoding": "float"}, "has no 'structure'; add it"),
        ({"rank": 12, "storage": "plain"}, "has the old key 'storage'; write structure and encoding instead"),
        (entry(rnk=12), "unknown key 'rnk'; near names: 'rank'"),
        (entry(rank=12, encoding="zip"), "unknown encoding 'zip'; known: float, int8, remap"),
        (entry(rank=12, encoding=["float"]), r"unknown encoding \['float'\]"),
        (entry(rank=12, encoding="plain"), "unknown encoding 'plain'; known: float"),
        (entry(rank=12, structure="low-rank"), "unknown structure 'low-rank'; known: low_rank, dense"),
        (entry(rank=12, structure="pivotd"), "unknown structure 'pivotd'; known: pivoted"),
        (entry(structure="pivoted"), "rank is None; structure 'pivoted' needs a whole number of at least 1"),
        (entry(rank=12, structure=["low_rank"]), r"unknown structure \['low_rank'\]; known: "),
        (entry(rank=0), "rank is 0; structure 'low_rank' needs a whole number"),
        (entry(rank=True), "rank is True"),
        (entry(rank=12.0), "rank is 12.0"),
        (entry(rank="12"), "rank is '12'"),
        (entry(), "rank is None; .*to leave the matrix as it is, write structure 'dense' and encoding 'float'"),
        (entry(rank=12, structure="dense"), "structure 'dense' has no rank, got 12; remove the rank"),
        (entry(rank=12, structure="dense", encoding="int8"), "structure 'dense' has no rank, got 12; remove the rank"),
    ],
)
def test_from_dict_names_the_module(found: object, message: str) -> None:
    data = PLAN.to_dict()
    data["modules"][Q] = found
    with pytest.raises(ValueError, match=f"module '{Q}'.*{message}"):
        Plan.from_dict(data)


def test_only_an_object_is_a_plan() -> None:
    with pytest.raises(ValueError, match=r"the plan must be a JSON object, got \[\]"):
        Plan.from_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "format_version": 2,\n  "ratio": ,\n}', "plan.json, line 3: invalid JSON, Expecting value; correct"),
        ("", "plan.json, line 1: invalid JSON"),
        ('{"format_version": 2, "format_version": 2}', "plan.json: 'format_version' appears twice; keep one"),
        ("[" * 100_000, "plan.json: nested far deeper than a plan"),
        ('{"format_version": 9}', "plan.json: .*upgrade optimum-dobisvd"),
        (json.dumps(PLAN.to_dict()).replace('"rank": 12', '"rank": -1'), f"plan.json: module '{Q}': rank is -1"),
        (json.dumps(PLAN.to_dict()).replace("12", "1" * 5000), "plan.json: .*digits"),
    ],
)
def test_load_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_load_of_no_file_and_of_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no plan at .*plan.json; check the path"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"plan.json: not a text file .*JSON in UTF-8"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {Q + "x": PLAN.modules[Q]},
            f"'{Q}x', which is not one of the 2 matrices .*near names: '{Q}'.*rename or remove",
        ),
        ({Q: low_rank(65)}, f"{Q}: rank 65 is above 64, the most a 64x64 matrix has; lower it"),
        (
            {Q: low_rank(32)},
            f"{Q}: at rank 32 .*not smaller than the dense .*at most 31, or leave it as it is",
        ),
        ({K: low_rank(16)}, f"{K}: at rank 16 .*use at most 12, or leave it as it is"),
        (
            {Q: low_rank(20, "gptq4_g32")},
            f"{Q}: gptq4_g32 takes ranks in multiples of 32, and it is to have 20; change the rank, or leave the matr",
        ),
        (
            {K: PlannedModule("dense", "gptq4_g32")},
            f"{K}: gptq4_g32 takes outputs in multiples of 32, and it has 16; take another encoding, or leave the",
        ),
        (
            {Q: pivoted(64)},
            f"{Q}: structure 'pivoted' at rank 64 has all rows of the matrix in its first linear; change the rank, or",
        ),
        ({Q: pivoted(65)}, f"{Q}: rank 65 is above 64, the most a 64x64 matrix has; lower it"),
        (
            {K: pivoted(16)},
            f"{K}: structure 'pivoted' at rank 16 has all rows of the matrix in its first linear; change the rank, or",
        ),
        # With the 64 bytes of the permutation: without, every rank below 64 would be smaller.
        ({Q: pivoted(63)}, f"{Q}: at rank 63 .*not smaller than the dense matrix; use at most 58, or leave it as it"),
        (
            {Q: pivoted(8, "remap")},
            f"{Q}: remap is for factors that can be scaled, and structure 'pivoted' fixes them; take another",
        ),
        (
            {Q: pivoted(20, "gptq4_g32")},
            f"{Q}: gptq4_g32 takes ranks in multiples of 32, and it is to have 20; change the rank, or leave the matr",
        ),
        (
            {Q: pivoted(64, "gptq4_g32")},
            f"{Q}: structure 'pivoted' at rank 64 has all rows of the matrix in its first linear; change the rank",
        ),
    ],
)
def test_check_names_what_does_not_fit_the_model(change: dict, message: str) -> None:
    plan = Plan(PLAN.modules | change, method="m", ratio=None, allocation="a")
    for use in (plan.check, plan.bytes, plan.ratio_of):
        with pytest.raises(ValueError, match=message):
            use(TARGETS)


def test_check_wants_every_target_planned() -> None:
    more = [*TARGETS, Target("model.layers.1.up", 8, 8, 2), Target("model.layers.1.down", 8, 8, 2)]
    with pytest.raises(ValueError, match=r"nothing about 'model.layers.1.up' and 1 more; add a structure, a rank"):
        PLAN.check(more)
    with pytest.raises(ValueError, match="given twice"):
        PLAN.check([*TARGETS, TARGETS[0]])


def test_check_of_a_matrix_without_useful_rank_offers_only_to_leave_it() -> None:
    plan = Plan({"a": low_rank(1)}, method="m", ratio=None, allocation="a")
    with pytest.raises(ValueError, match="dense matrix; leave it as it is"):
        plan.check([Target("a", 2, 2, 2)])


def test_directions_are_written_as_ranges_counted_from_one(tmp_path: Path) -> None:
    module = low_rank(6, directions=(0, 1, 2, 5, 7, 8))
    Plan({Q: module}, method="m", ratio=None, allocation="a", basis="0123").save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert f'"{Q}": {{"structure": "low_rank", "rank": 6, "encoding": "float", "directions": "1-3,6,8-9"}}' in text
    assert Plan.load(tmp_path / "plan.json").modules == {Q: module}
    assert Plan.load(tmp_path / "plan.json").basis == "0123"
    assert list(module.kept) == [0, 1, 2, 5, 7, 8]
    assert low_rank(3, directions=(0, 1, 2)) == low_rank(3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 2, "directions": "1-3"}, "rank is 2 and 3 directions are named; make them agree, or remove"),
        ({"rank": 2, "directions": "3,1"}, "directions must be ascending numbers, each given once"),
        ({"rank": 2, "directions": "0-1"}, "directions must be ascending numbers, each given once, the first one"),
        ({"rank": 2, "directions": "4-4,4"}, "directions must be ascending numbers, each given once"),
        ({"rank": 2, "directions": [1, 2]}, r"directions are numbers and ranges of them, such as '1-40.*got \[1, 2\]"),
        ({"rank": 3, "directions": "1-2,9-5,7"}, "directions: the range 9-5 runs backwards"),
        ({"rank": 2, "directions": "1-2,"}, "directions are numbers and ranges of them"),
        (
            {"rank": 2, "directions": "1-999999999"},
            "directions: 1-999999999 goes beyond 1000000, more than any matrix has",
        ),
    ],
)
def test_impossible_directions_name_the_module(values: dict, message: str) -> None:
    data = PLAN.to_dict()
    data["modules"][Q] = entry(**values)
    with pytest.raises(ValueError, match=f"module '{Q}': {message}"):
        Plan.from_dict(data)


def test_directions_without_a_basis_are_refused() -> None:
    with pytest.raises(ValueError, match=f"module '{Q}' names directions, and the plan's basis is None"):
        Plan({Q: low_rank(1, directions=(3,))}, method="m", ratio=None, allocation="a")


def test_a_matrix_that_is_not_factorized_has_no_directions() -> None:
    with pytest.raises(ValueError, match="rank is None and 1 directions are named"):
        PlannedModule("dense", "float", directions=(0,))


def test_directions_that_the_matrix_does_not_have_are_refused() -> None:
    modules = {**PLAN.modules, K: low_rank(2, directions=(0, 16))}
    plan = Plan(modules, method="m", ratio=None, allocation="a", basis="0123")
    with pytest.raises(ValueError, match=f"{K}: direction 17 is named, and the matrix has 16"):
        plan.check(TARGETS)
