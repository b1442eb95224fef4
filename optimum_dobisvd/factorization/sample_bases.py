"""The second pass of Dobi-SVD's IPCA factorizer: every sample's outputs, once the ranks are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model.offloaded import dense_bias, dense_weight
from .dobi_ipca import IncrementalBasis, project, sample_basis
from .factors import Factors


class SampleBasisVisitor:
    """A block visitor that runs Algorithm 2 on the outputs of each linear and hands the block's factors to `finished`.

    Args:
        linears_of: block name -> its linears to factorize, by full name.
        ranks: linear name -> rank.
        finished: called with block name and factors by linear name.
    """

    def __init__(
        self,
        linears_of: Callable[[str], dict[str, nn.Module]],
        ranks: dict[str, int],
        finished: Callable[[str, dict[str, Factors]], None],
    ) -> None:
        self._linears_of = linears_of
        self._ranks = ranks
        self._finished = finished
        self._bases: dict[str, IncrementalBasis] = {}
        self._biases: dict[str, Tensor] = {}
        self._handles: dict[str, list[RemovableHandle]] = {}
        self._mask: Tensor | None = None

    def wants(self, name: str) -> bool:
        return bool(self._planned(name))

    def enter(self, name: str, block: nn.Module) -> None:
        handles = self._handles.setdefault(name, [])
        for linear, module in self._planned(name).items():
            self._bases[linear] = IncrementalBasis(dense_weight(module).shape[0], self._ranks[linear])
            bias = dense_bias(module)
            if bias is not None:
                self._biases[linear] = bias
            handles.append(module.register_forward_hook(partial(self._observe, linear)))

    def start_batch(self, mask: Tensor) -> None:
        self._mask = mask

    def leave(self, name: str, block: nn.Module) -> None:
        _remove(self._handles.pop(name))
        factors = {}
        for linear, module in self._planned(name).items():
            self._biases.pop(linear, None)
            try:
                basis = self._bases.pop(linear).basis()
            except ValueError as error:
                raise ValueError(f"{linear}: {error}; list it in modules_to_not_convert") from error
            factors[linear] = project(dense_weight(module), basis)
        self._finished(name, factors)

    def abandon(self) -> None:
        for handles in self._handles.values():
            _remove(handles)
        self._handles.clear()
        self._bases.clear()
        self._biases.clear()

    def _planned(self, block: str) -> dict[str, nn.Module]:
        return {name: module for name, module in self._linears_of(block).items() if name in self._ranks}

    def _observe(self, linear: str, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        mask = self._mask
        if mask is None or output.shape[:-1].numel() != mask.numel():
            raise ValueError(
                f"{linear}: its outputs are not one row per token of each sample, which dobi_ipca needs (routed "
                "experts?); use factorization='output_pca', or list it in modules_to_not_convert"
            )
        plain = output.detach().double()
        if linear in self._biases:
            plain = plain - self._biases[linear].to(plain.device)
        # Some models (OPT) hand their linears all tokens of a batch as one list.
        samples = plain.reshape(*mask.shape, -1)
        for sample, keep in zip(samples, mask.to(plain.device), strict=True):
            self._bases[linear].update(sample_basis(sample[keep], self._ranks[linear]))


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
