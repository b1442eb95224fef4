"""The second pass of Dobi-SVD's IPCA factorizer: every sample's outputs, once the ranks are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..calibration.tokens import token_places
from ..calibration.visitor import LinearsVisitor
from ..model.offloaded import dense_bias, dense_weight
from .dobi_ipca import IncrementalBasis, project, sample_basis
from .factors import Factors


class SampleBasisVisitor(LinearsVisitor):
    """A block visitor that runs Algorithm 2 on the outputs of each linear and hands the block's factors to `finished`.

    Args:
        linears_of: block name -> its linears to factorize, by full name.
        ranks: linear name -> rank.
        finished: called with block name and factors by linear name.
    """

    needs_token_order = True

    def __init__(
        self,
        linears_of: Callable[[str], dict[str, nn.Module]],
        ranks: dict[str, int],
        finished: Callable[[str, dict[str, Factors]], None],
    ) -> None:
        def planned(block: str) -> dict[str, nn.Module]:
            return {name: module for name, module in linears_of(block).items() if name in ranks}

        super().__init__(planned, finished, lambda block: bool(planned(block)))
        self._ranks = ranks

    def _hook(self, block: str, linear: str, module: nn.Module) -> RemovableHandle:
        self._sums[linear] = IncrementalBasis(dense_weight(module).shape[0], self._ranks[linear])
        return module.register_forward_hook(partial(self._observe, linear, dense_bias(module)))

    def _result(self, block: str) -> dict[str, Factors]:
        factors = {}
        for linear, module in self._linears_of(block).items():
            sums, weight = self._sums.pop(linear), dense_weight(module)
            # Outputs that are always zero have no directions: those of the weight are as good as any.
            basis = torch.linalg.svd(weight.double())[0][:, : self._ranks[linear]] if sums.is_empty else sums.basis()
            factors[linear] = project(weight, basis)
        return factors

    def _observe(self, linear: str, bias: Tensor | None, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        mask = self._mask
        places = None if mask is None else token_places(output.shape[:-1], mask)
        if mask is None or places is None:
            raise ValueError(
                f"{linear}: its outputs are not one row per token of each sample, which dobi_ipca needs (routed "
                "experts?); use factorization='output_pca', or list it in modules_to_not_convert"
            )
        plain = output.detach().double()
        if bias is not None:
            plain = plain - bias.to(plain.device)
        rows = plain.reshape(-1, plain.shape[-1])
        for sample, keep in zip(places.reshape(*mask.shape, -1), mask.cpu(), strict=True):
            chosen = sample[keep].flatten().to(rows.device)
            self._sums[linear].update(sample_basis(rows[chosen], self._ranks[linear]))
