"""The factorizers by name: what each needs to know of the inputs, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..registry import Registry
from .factors import Decomposition
from .kfac import kfac, kfac_spectrum, output_root
from .truncated_svd import output_pca, output_spectrum, whitened_spectrum, whitened_svd
from .whitening import channel_scaling, cholesky_whitening, eigen_whitening

Statistic = Literal["gram", "abs_mean"]


@dataclass(frozen=True)
class Factorization:
    """One row.

    `needs` names the statistic of the input it reads (None: no data). `prepare` turns that statistic into whatever is
    shared by all linears with the same input (q/k/v, gate/up); `decompose` takes the weight and that, and so does
    `spectrum`, which finds the singular values alone, for pricing ranks. Where `prepare_output` is given the
    factorizer reads the gradient Gram of the linear's output, too: it is prepared by that, and both functions take the
    pair `(prepared input, prepared output)`. `per_sample` marks a factorizer that reads each calibration sample's
    outputs in a second pass, after the ranks are known. `in_units_of_loss` says that its squared singular values are
    nats per token, so that those of different matrices can be compared.
    """

    name: str
    needs: Statistic | None
    prepare: Callable[[Tensor], Any]
    decompose: Callable[[Tensor, Any], Decomposition]
    spectrum: Callable[[Tensor, Any], Tensor]
    per_sample: bool = False
    prepare_output: Callable[[Tensor], Any] | None = None
    in_units_of_loss: bool = False

    @property
    def needs_gradients(self) -> bool:
        """Whether it reads gradient Grams."""
        return self.prepare_output is not None


FACTORIZATIONS: Registry[Factorization] = Registry("factorization")


def _as_is(statistic: Tensor) -> Tensor:
    return statistic


for _row in (
    Factorization("svd", None, _as_is, lambda w, _: whitened_svd(w, None), lambda w, _: whitened_spectrum(w, None)),
    Factorization("asvd", "abs_mean", channel_scaling, whitened_svd, whitened_spectrum),
    Factorization("svd_llm", "gram", cholesky_whitening, whitened_svd, whitened_spectrum),
    Factorization("svd_llm_v2", "gram", eigen_whitening, whitened_svd, whitened_spectrum),
    Factorization("output_pca", "gram", _as_is, output_pca, output_spectrum),
    Factorization("kfac", "gram", _as_is, kfac, kfac_spectrum, prepare_output=output_root, in_units_of_loss=True),
    Factorization("dobi_ipca", "gram", _as_is, output_pca, output_spectrum, per_sample=True),
):
    FACTORIZATIONS.register(_row.name, _row)
