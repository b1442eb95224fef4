"""The second pass of Dobi-SVD's IPCA factorizer: every sample's outputs, once the ranks are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..calibration.tokens import token_places
from ..calibration.visitor import LinearsVisitor
from ..model.experts import ROUTED_ROWS, RoutedRows
from ..model.offloaded import dense_bias, dense_weight
from ..statistics.pooling import pools
from .dobi_ipca import IncrementalBasis, project, sample_basis
from .factors import Factors


class SampleBasisVisitor(LinearsVisitor):
    """A block visitor that runs Algorithm 2 on the outputs of each linear and hands the block's factors to `finished`.

    A sample of an expert is what of a window is routed to it. One that no token reaches keeps the directions of its
    weight.

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
        self._seen: set[str] = set()

    def _hook(self, block: str, linear: str, module: nn.Module) -> RemovableHandle:
        self._sums[linear] = IncrementalBasis(dense_weight(module).shape[0], self._ranks[linear])
        return module.register_forward_hook(partial(self._observe, linear, dense_bias(module)))

    def _result(self, block: str) -> dict[str, Factors]:
        factors, linears = {}, self._linears_of(block)
        pooled = {name for members in pools(block, dict.fromkeys(linears, 0)).values() for name in members}
        for linear, module in linears.items():
            sums, weight = self._sums.pop(linear), dense_weight(module)
            if linear in pooled and linear not in self._seen:
                basis = sample_basis(weight.T, self._ranks[linear])
            elif sums.is_empty:  # outputs that are always zero have no directions: those of the weight are as good
                basis = torch.linalg.svd(weight.double())[0][:, : self._ranks[linear]]
            else:
                basis = sums.basis()
            factors[linear] = project(weight, basis)
        return factors

    def _observe(self, linear: str, bias: Tensor | None, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        mask, routed = self._mask, ROUTED_ROWS.get()
        self._seen.add(linear)
        windows = None if mask is None else _rows_of_windows(output.shape[:-1], mask, routed)
        if windows is None:
            raise ValueError(
                f"{linear}: its outputs are not one row per token of each sample, which dobi_ipca needs (routed "
                "experts?); use factorization='output_pca', or list it in modules_to_not_convert"
            )
        plain = output.detach().double()
        if bias is not None:
            plain = plain - bias.to(plain.device)
        rows = plain.reshape(-1, plain.shape[-1])
        for chosen in windows:
            if len(chosen) or routed is None:
                self._sums[linear].update(sample_basis(rows[chosen.to(rows.device)], self._ranks[linear]))


def _rows_of_windows(shape: torch.Size, mask: Tensor, routed: RoutedRows | None) -> list[Tensor] | None:
    """Return which rows of activations of that shape are of each window's text; None where that cannot be told."""
    if routed is None:
        places = token_places(shape, mask)
        if places is None:
            return None
        samples = places.reshape(*mask.shape, -1)
        return [sample[keep].flatten() for sample, keep in zip(samples, mask.cpu(), strict=True)]
    if routed.total != mask.numel():
        return None
    tokens = routed.tokens.cpu()
    kept = mask.reshape(-1).cpu()[tokens]
    return [(kept & (tokens // mask.shape[1] == window)).nonzero().flatten() for window in range(len(mask))]
