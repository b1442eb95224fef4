"""The matrices to be allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One matrix to be allocated: a linear's m×n weight (m outputs), by its dotted module name.

    `element_size` is the bytes of one element of the dense weight. ValueError for a size that is no whole number of at
    least 1.
    """

    name: str
    out_features: int
    in_features: int
    element_size: int

    def __post_init__(self) -> None:
        for field in ("out_features", "in_features", "element_size"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"{self.name}: {field} is {value!r}; it must be a whole number of at least 1")

    @property
    def dense_bytes(self) -> int:
        """Bytes of the matrix as it is."""
        return self.out_features * self.in_features * self.element_size

    @property
    def kind(self) -> str:
        """The last component of the name, such as "q_proj": the group type of SVD-LLM V2's Algorithm 1."""
        return self.name.rpartition(".")[2]


def targets_by_name(targets: Iterable[Target]) -> dict[str, Target]:
    """`{name: target}`, in order. ValueError where there are no targets, or a name appears twice."""
    known: dict[str, Target] = {}
    for target in targets:
        if target.name in known:
            raise ValueError(f"{target.name!r} is given twice among the matrices to compress; give each one once")
        known[target.name] = target
    if not known:
        raise ValueError("there is no matrix to compress; check which modules are excluded")
    return known
