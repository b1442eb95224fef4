"""Tables of things by name: methods, allocations, factorizers, structures, encodings."""

import pytest

from optimum_dobisvd.allocation.registry import ALLOCATIONS
from optimum_dobisvd.encodings.registry import ENCODINGS
from optimum_dobisvd.factorization.registry import FACTORIZATIONS
from optimum_dobisvd.methods import METHODS
from optimum_dobisvd.registry import Registry
from optimum_dobisvd.structures.registry import STRUCTURES


def test_entries_come_back_by_name_in_the_order_of_registration() -> None:
    numbers: Registry[int] = Registry("number")
    assert (len(numbers), list(numbers), "two" in numbers) == (0, [], False)
    assert numbers.register("two", 2) == 2
    numbers.register("one", 1)
    assert list(numbers) == ["two", "one"]
    assert [numbers.get(name) for name in numbers] == [2, 1]
    assert len(numbers) == 2
    assert "two" in numbers
    assert "three" not in numbers


@pytest.mark.parametrize(("name", "shown"), [("one", "'one'"), ("", "''")])
def test_a_name_that_is_taken_or_empty_is_refused_and_nothing_is_changed(name: str, shown: str) -> None:
    numbers: Registry[int] = Registry("number")
    numbers.register("one", 1)
    with pytest.raises(ValueError, match=f"number {shown} is already registered or has no name; choose another name"):
        numbers.register(name, 7)
    assert [(each, numbers.get(each)) for each in numbers] == [("one", 1)]


def test_an_unknown_name_lists_all_there_are_and_the_nearest_first() -> None:
    fruits: Registry[int] = Registry("fruit")
    for name in ("apple", "pear", "peach"):
        fruits.register(name, 0)
    with pytest.raises(ValueError, match="^unknown fruit 'pech'; known: peach, pear, apple$"):
        fruits.get("pech")
    with pytest.raises(ValueError, match="^unknown fruit 'kiwi'; known: apple, pear, peach$"):
        fruits.get("kiwi")


@pytest.mark.parametrize("name", [None, 3, ["one"], {"one": 1}, ("one",)])
def test_what_is_no_string_is_an_unknown_name(name: object) -> None:
    """It may come from a hand-edited JSON file."""
    numbers: Registry[int] = Registry("number")
    numbers.register("one", 1)
    assert name not in numbers
    with pytest.raises(ValueError, match="unknown number .*; known: one"):
        numbers.get(name)


@pytest.mark.parametrize(
    ("registry", "misspelt", "message"),
    [
        (METHODS, "svdllm", "unknown method 'svdllm'; known: svd_llm, .*global"),
        (ALLOCATIONS, "unifrom", "unknown allocation 'unifrom'; known: uniform, .*svd_llm_v2"),
        (FACTORIZATIONS, "asdv", "unknown factorization 'asdv'; known: asvd, .*svd_llm_v2"),
        (STRUCTURES, "lowrank", "unknown structure 'lowrank'; known: low_rank, dense"),
        (
            ENCODINGS,
            "gtpq",
            "unknown kind of encoding 'gtpq'; known: gptq, float, int8, remap, autoround, bitsandbytes",
        ),
    ],
)
def test_every_table_names_what_is_in_it(registry: Registry, misspelt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.get(misspelt)
    name = next(iter(registry))
    with pytest.raises(ValueError, match=f"{name!r} is already registered"):
        registry.register(name, registry.get(name))
