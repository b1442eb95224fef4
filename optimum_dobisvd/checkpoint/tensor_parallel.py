"""transformers' tensor parallelism (`tp_plan="auto"`) on compressed linears. Bundled with every checkpoint.

A plan names layers by patterns in which all blocks are alike (`model.layers.*.mlp.up_proj`), and here each may be in
another structure. So every module is told its own style, and the plan has one style, which does as the module is told.
What is called of transformers is private, and there since the release that asks quantizers to update plans.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..encodings.registry import encoding_named
from ..structures.base import CompressedLinear

_STYLE = "dobi_svd"
_TOLD = "_dobi_svd_style"
_WHOLE, _ROWWISE, _GATHERED = "replicate", "rowwise", ("colwise_rep", "colwise_gather_output")


def update_plan(model: nn.Module, plan: dict[str, str]) -> None:
    """Have a plan, `{pattern of names: style}`, share out compressed linears by what they are made of.

    Of one whose outputs are shared out (`colwise`) the last linear is so, and those before it are whole everywhere.
    Where outputs are not in the last linear's order, all is computed everywhere, and each process takes its outputs.
    Of one whose inputs are shared out (`rowwise`) the first linear is so, and what it gives is summed up: the rank's
    numbers, not the outputs'. The others are whole everywhere.
    """
    # transformers' own; releases without it never come here.
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

    if _STYLE not in ALL_PARALLEL_STYLES:
        as_told: Any = _AsTold()
        ALL_PARALLEL_STYLES.register(_STYLE, as_told)
    modules = dict(model.named_modules())
    asked: dict[str, list[str]] = {}
    for name in modules:
        asked.setdefault(replace_layer_number_by_wildcard(name), []).append(name)
    for pattern, style in list(plan.items()):
        names = asked.get(pattern, [])
        if not any(isinstance(each, CompressedLinear) for name in names for each in modules[name].modules()):
            continue
        plan[pattern] = _STYLE
        for name in names:
            for below, told in _styles(name, modules[name], style).items():
                plan[f"{pattern}{below}"] = _STYLE
                setattr(modules[f"{name}{below}"], _TOLD, told)


def _styles(name: str, module: nn.Module, style: str) -> dict[str, str]:
    """Return the styles of a module that is to have one itself, and of what it is made of, by what to add to its name.

    A style that cannot be is an error in words instead, which is raised when the model is shared out.
    """
    if not isinstance(module, CompressedLinear):
        holds = any(isinstance(each, CompressedLinear) for each in module.modules())
        return {"": f"{name} holds compressed experts, which tensor parallelism cannot share out" if holds else style}
    children = [child for child, _ in module.named_children()]
    whole = {f".{child}": _WHOLE for child in children}
    if not encoding_named(module.encoding).sliceable:
        return {"": f"{name} is stored as {module.encoding}, which tensor parallelism cannot share out"}
    if style.startswith(_ROWWISE):
        return {"": _WHOLE, **whole, f".{module.input_linear}": style}
    if module.outputs_in_order:
        return {"": _WHOLE, **whole, f".{children[-1]}": style}
    return {"": _WHOLE if style in _GATHERED else style, **whole}


class _AsTold:
    """The style of a plan that does what each module is told. The methods are those that transformers calls."""

    def _style(self, module: nn.Module) -> Any:
        from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

        told: str = getattr(module, _TOLD)
        if told not in ALL_PARALLEL_STYLES:
            raise ValueError(f"{told}: load the model without tp_plan, on one device or with device_map='auto'")
        return ALL_PARALLEL_STYLES[told]

    def validate_param(self, module: nn.Module, param: Any, mesh: Any, parameter_name: str | None = None) -> None:
        self._style(module).validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        tensor = module._parameters[param]
        a_value_per_output = tensor is not None and tensor.ndim == 1
        if isinstance(module, CompressedLinear) or (
            a_value_per_output and getattr(module, _TOLD).startswith(_ROWWISE)
        ):
            return  # whole everywhere
        self._style(module).shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        style = self._style(module)
        if isinstance(module, CompressedLinear):
            return module if getattr(module, _TOLD) == _WHOLE else _with_own_outputs(module, mesh)
        if not isinstance(module, nn.Linear):
            module._hf_quantized_needs_local_tp = True  # type: ignore[assignment] # kernels take no DTensor
        found: nn.Module = style.install_forward(module, mesh)
        return found


def _with_own_outputs(module: CompressedLinear, mesh: Any) -> CompressedLinear:
    """Have a linear that computes all outputs on every process give those of this one."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = module.forward

    def own(*args: Any, **kwargs: Any) -> torch.Tensor:
        y = DTensor.from_local(whole(*args, **kwargs), mesh, [Replicate()], run_check=False)
        return y.redistribute(placements=[Shard(-1)]).to_local()

    module.forward = own
    return module
