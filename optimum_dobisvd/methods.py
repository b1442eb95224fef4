"""The compression methods, one row each: which metric prices ranks, who allocates, who factorizes, what is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .allocation import allocation_named
from .factorization.registry import factorization_named
from .storage.costs import storage_named


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`.

    `metric` names the factorizer whose singular values price the ranks; it matters only to an allocation that reads
    spectra. The statistics to collect follow from the columns (`statistics`).
    """

    metric: str
    allocation: str
    factorization: str
    storage: str

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the input statistics this row reads: none, `gram`, `abs_mean`, or both."""
        rows = [factorization_named(self.factorization)]
        if allocation_named(self.allocation).needs_spectra:
            rows.append(factorization_named(self.metric))
        return frozenset(row.needs for row in rows if row.needs is not None)

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients of the loss are to be collected, too."""
        rows = [factorization_named(self.factorization)]
        if allocation_named(self.allocation).needs_spectra:
            rows.append(factorization_named(self.metric))
        return any(row.needs_gradients for row in rows)

    @property
    def learns(self) -> bool:
        """Whether ranks are learned, which takes windows to judge them on."""
        return self.learning_mode is not None

    @property
    def learning_mode(self) -> Literal["fixed_basis", "activation"] | None:
        """In which way, see `learning.learn`."""
        return allocation_named(self.allocation).learns

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed at all."""
        return bool(self.statistics) or factorization_named(self.factorization).per_sample or self.learns


METHODS: dict[str, Method] = {}


def register_method(name: str, method: Method) -> None:
    """Add a row. A second row of the same name, or a column that names nothing registered, is refused."""
    if name in METHODS:
        raise ValueError(f"a method named {name!r} is already registered")
    factorization_named(method.metric)
    factorization_named(method.factorization)
    allocation_named(method.allocation)
    storage_named(method.storage)
    METHODS[name] = method


def method_named(
    name: str, *, allocation: str | None = None, factorization: str | None = None, storage: str | None = None
) -> Method:
    """The row of that name with any column replaced. ValueError lists the names there are."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    method = METHODS[name]
    if factorization is not None:
        method = replace(method, factorization=factorization_named(factorization).name, metric=factorization)
    if allocation is not None:
        method = replace(method, allocation=allocation_named(allocation).name)
    if storage is not None:
        method = replace(method, storage=storage_named(storage).name)
    return method


register_method("global", Method(metric="kfac", allocation="global", factorization="kfac", storage="plain"))
register_method("dobi", Method("output_pca", "dobi_activation", "dobi_ipca", "remap"))
register_method("dobi_no_remap", Method("output_pca", "dobi_activation", "dobi_ipca", "plain"))
for _name, _allocation in (
    ("svd", "uniform"),
    ("asvd", "uniform"),
    ("svd_llm", "uniform"),
    ("svd_llm_v2", "svd_llm_v2"),
    ("output_pca", "uniform"),
    ("dobi_ipca", "uniform"),
):
    register_method(_name, Method(metric=_name, allocation=_allocation, factorization=_name, storage="plain"))
