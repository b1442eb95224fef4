"""Which modules a pattern means, and which override wins."""

import pytest

from integration_tests.allocation.budget_cases import smollm2_targets
from optimum_dobisvd.model.patterns import Override, matching_names, resolve_overrides, select

NAMES = [target.name for target in smollm2_targets()]
FIRST_Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (FIRST_Q, 1),
        ("q_proj", 30),
        ("self_attn.q_proj", 30),
        ("layers.1", 7),
        ("layers.1.mlp", 3),
        ("model.layers", 210),
        ("proj", 0),
        ("attn.q_proj", 0),
        ("layers", 210),
        ("q_proj.", 0),
        ("", 0),
        ("model..layers", 0),
        (r"re:model\.layers\.1[0-9]\..*_proj", 70),
        ("re:q_proj", 0),
        ("re:.*q_proj", 30),
        ("re:", 0),
    ],
)
def test_patterns_match_whole_components_or_a_whole_regex(pattern: str, count: int) -> None:
    matched = matching_names(pattern, NAMES)
    assert len(matched) == count
    assert matched == [name for name in NAMES if name in matched]


def test_select_is_the_union() -> None:
    assert select([], NAMES) == set()
    assert select(["layers.0", "q_proj"], NAMES) == {*NAMES[:7], *(name for name in NAMES if name.endswith("q_proj"))}


def test_later_patterns_win_and_a_full_name_wins_over_all() -> None:
    overrides = {
        FIRST_Q: {"rank": 7},
        "q_proj": {"ratio": 0.5},
        "layers.0": {"dense": True},
        r"re:.*\.0\.mlp\..*": {"rank": 9},
    }
    resolved = resolve_overrides(overrides, NAMES)
    assert resolved[FIRST_Q] == Override(rank=7)
    assert resolved["model.layers.1.self_attn.q_proj"] == Override(ratio=0.5)
    assert resolved["model.layers.0.self_attn.o_proj"] == Override(dense=True)
    assert resolved["model.layers.0.mlp.up_proj"] == Override(rank=9)
    assert list(resolved) == [name for name in NAMES if name in resolved]
    assert len(resolved) == 7 + 29


def test_no_overrides_resolve_to_none() -> None:
    assert resolve_overrides({}, NAMES) == {}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_porj", "'q_porj' matches no module; near names: 'q_proj'"),
        ("self_atn.q_proj", "near names: 'self_attn.q_proj'"),
        ("model.layers.0.self_attn.q_prj", "near names: 'model.layers.0.self_attn.q_proj'"),
        ("re:model.layers.0.self_attn.q_prj", "near names: 'model.layers.0.self_attn.q_proj'"),
        ("zzzz", "names there are: 'model', 'layers', '0', ..."),
        ("re:(", r"'re:\(' is not a valid regular expression: .*; correct it"),
    ],
)
def test_a_pattern_that_means_nothing_is_an_error(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select([pattern], NAMES)
    with pytest.raises(ValueError, match=message):
        resolve_overrides({pattern: {"rank": 4}}, NAMES)


def test_no_names_at_all_is_said() -> None:
    with pytest.raises(ValueError, match="there are no names to match"):
        select(["q_proj"], [])


def test_a_bare_string_is_not_a_list_of_patterns() -> None:
    with pytest.raises(ValueError, match=r"must be a list of strings, got the string 'q_proj'; write \['q_proj'\]"):
        select("q_proj", NAMES)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "exactly one of ratio, rank and dense is needed, got none"),
        ({"rank": 3, "dense": True}, "exactly one of .*, got rank and dense"),
        ({"rnak": 3}, "unknown key 'rnak'; near names: 'rank'"),
        ({"rank": 0}, "rank is 0; it must be a whole number of at least 1"),
        ({"rank": True}, "rank is True"),
        ({"rank": 3.0}, "rank is 3.0"),
        ({"ratio": 0}, "ratio is 0; it is the fraction of the bytes kept"),
        ({"ratio": 1.1}, "ratio is 1.1"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": "0.5"}, "ratio is '0.5'"),
        ({"ratio": True}, "ratio is True"),
        ({"dense": False}, "dense is False; it can only be true"),
        ({"dense": 1}, "dense is 1; it can only be true"),
        (64, 'expected an object such as {"rank": 64}, got 64'),
    ],
)
def test_a_bad_override_is_an_error_that_names_the_pattern(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"override 'q_proj': .*{message}"):
        resolve_overrides({"q_proj": entry}, NAMES)
