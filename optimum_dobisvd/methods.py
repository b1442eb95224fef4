"""The compression methods, one row each: importance scores, allocation, factorization, structure, encoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .allocation.registry import ALLOCATIONS, Allocation
from .encodings.registry import encoding_named
from .factorization.registry import FACTORIZATIONS, Factorization
from .registry import Registry
from .structures.registry import AUTO, STRUCTURE_SETTINGS


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`.

    `metric` matters only to an allocation that reads spectra. The statistics to collect follow from the columns.

    Raises:
        ValueError: a column names nothing registered.
    """

    metric: str
    allocation: str
    factorization: str
    structure: str = "low_rank"
    encoding: str = "float"

    def __post_init__(self) -> None:
        # To look a name up is to check it.
        _ = self.importance, self.factorizer, self.allocator
        STRUCTURE_SETTINGS.get(self.structure)
        encoding_named(self.encoding)

    @property
    def allocator(self) -> Allocation:
        """The row of the allocation."""
        return ALLOCATIONS.get(self.allocation)

    @property
    def factorizer(self) -> Factorization:
        """The row of the factorization."""
        return FACTORIZATIONS.get(self.factorization)

    @property
    def importance(self) -> Factorization:
        """The row of the metric: the factorizer whose singular values, squared, are the importance scores."""
        return FACTORIZATIONS.get(self.metric)

    @property
    def _rows(self) -> list[Factorization]:
        return [self.factorizer, *([self.importance] if self.allocator.needs_spectra else [])]

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the input statistics this row reads: none, `gram`, `abs_mean`, or both."""
        return frozenset(row.needs for row in self._rows if row.needs is not None)

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients of the loss are to be collected, too."""
        return any(row.needs_gradients for row in self._rows)

    @property
    def learns(self) -> bool:
        """Whether ranks are learned, which takes windows to judge them on."""
        return self.learning_mode is not None

    @property
    def learning_mode(self) -> Literal["fixed_basis", "activation"] | None:
        """In which way, see `learning.learn`."""
        return self.allocator.learns

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed at all."""
        return bool(self.statistics) or self.factorizer.per_sample or self.learns

    @property
    def weighs_loss(self) -> bool:
        """Whether importance scores are in units of the loss, and the allocation compares them across matrices."""
        return self.allocator.weighs_loss and self.importance.in_units_of_loss


METHODS: Registry[Method] = Registry("method")
METHODS.register("global", Method("kfac", "global", "kfac", structure="auto"))
METHODS.register("dobi", Method("output_pca", "dobi_activation", "dobi_ipca", encoding="remap"))
METHODS.register("dobi_no_remap", Method("output_pca", "dobi_activation", "dobi_ipca"))
METHODS.register("svd", Method("svd", "uniform", "svd"))
METHODS.register("asvd", Method("asvd", "uniform", "asvd"))
METHODS.register("svd_llm", Method("svd_llm", "uniform", "svd_llm"))
METHODS.register("svd_llm_v2", Method("svd_llm_v2", "svd_llm_v2", "svd_llm_v2"))
METHODS.register("output_pca", Method("output_pca", "uniform", "output_pca"))
METHODS.register("dobi_ipca", Method("dobi_ipca", "uniform", "dobi_ipca"))


def method_named(
    name: str, *, allocation: str | None = None, factorization: str | None = None, structure: str | None = None
) -> Method:
    """Return the row of that name with any column replaced; naming a factorization changes the metric, too.

    ValueError lists the names there are.
    """
    given = {"allocation": allocation, "structure": structure, "factorization": factorization, "metric": factorization}
    found = replace(METHODS.get(name), **{column: value for column, value in given.items() if value is not None})
    if structure is None and found.structure == AUTO and not found.weighs_loss:
        return replace(found, structure="low_rank")  # what was put in cannot weigh structures
    return found
