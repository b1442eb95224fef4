"""Another storage for the factors of a compressed model: 16 bits to train in, 8 bits to ship."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .factorization.factors import Factors
from .nn.compressed_linear import CompressedLinear
from .nn.dense_linear import to_dense
from .nn.eight_bit_linear import EightBitLinear
from .nn.low_rank_linear import LowRankLinear
from .nn.placement import dense_weight, replace_with
from .stacking import dense_targets
from .storage import pack, pack_dense, unpack
from .storage.costs import DENSE_INT8
from .storage.inner_forms import inner_form_named

if TYPE_CHECKING:
    from .config import DobiSVDConfig

STORAGES = ("plain", "remap", "int8")


def change_storage(model: Any, storage: str, config: DobiSVDConfig) -> dict[str, dict[str, Any]]:
    """Give every matrix of a compressed model another storage, in place; ranks stay.

    Matrices left whole go with the factors: with `int8` all of them are rounded to 8 bits, else they are dense.

    Args:
        model: compressed, in memory.
        storage: `plain`, `remap` or `int8`.
        config: the model's, which says what was to stay dense.

    Returns:
        `modules` of config.json.

    Raises:
        ValueError: another storage; the model has nothing to store so, or matrices that another library quantized or
            that are offloaded. Then nothing was changed.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage {storage!r} cannot be changed to: take one of {', '.join(STORAGES)}")
    shells = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    for name, shell in shells.items():
        _check(name, shell)
    dense = dense_targets(model, config) if storage == "int8" else []
    if not shells and not dense:
        raise ValueError(f"the model has no matrix to store as {storage}: compress it first")
    modules: dict[str, dict[str, Any]] = {}
    for name, shell in shells.items():
        if shell.rank is not None:
            second, first = _factors(shell)
            balanced = Factors(second.double(), first.double()).balanced()
            tensors = pack(storage, balanced.second, balanced.first, shell.weight.dtype)
            replace_with(model, name, storage, shell.rank, tensors)
            modules[name] = {"rank": shell.rank, "storage": storage}
        elif storage == "int8":
            modules[name] = {"rank": None, "storage": DENSE_INT8}
        else:
            model.set_submodule(name, to_dense(shell))
    for target in dense:
        weight = dense_weight(model.get_submodule(target.name))
        replace_with(model, target.name, DENSE_INT8, None, pack_dense(DENSE_INT8, weight, weight.dtype)[0])
        modules[target.name] = {"rank": None, "storage": DENSE_INT8}
    return modules


def _check(name: str, shell: CompressedLinear) -> None:
    if inner_form_named(shell.storage) is not None:
        raise ValueError(
            f"{name} is stored as {shell.storage}, which another library reads: start from the checkpoint before it "
            "was quantized"
        )
    if any(parameter.device.type == "meta" for parameter in shell.parameters()):
        raise ValueError(f"{name} is offloaded: load the model without cpu or disk offload to store it otherwise")


def _factors(shell: CompressedLinear) -> tuple[Tensor, Tensor]:
    """`(second, first)`, m x k and k x n."""
    if isinstance(shell, LowRankLinear):
        return shell.second.weight.detach(), shell.first.weight.detach()
    if isinstance(shell, EightBitLinear):
        return unpack(shell.storage, shell.tensors(), shell.out_features, shell.in_features)
    raise TypeError(f"{type(shell).__name__} holds no factors")
