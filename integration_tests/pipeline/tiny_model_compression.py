"""Compressing tiny models in memory, and what holds of the result: it is as planned, or refused and untouched."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from integration_tests.tiny_models import tokens
from optimum_dobisvd import METHODS, DobiSVDQuantizer, Plan
from optimum_dobisvd.model.experts import linearize
from optimum_dobisvd.model.linears import weight_matrix
from optimum_dobisvd.report.report import CompressionReport
from optimum_dobisvd.structures.base import compressed_linears

WINDOWS = tokens(8, 48)
Q0 = "model.layers.0.self_attn.q_proj"
DOWN2 = "model.layers.2.mlp.down_proj"


def compress(model: nn.Module, **settings: Any) -> DobiSVDQuantizer:
    defaults: dict[str, Any] = {"ratio": 0.7, "dataset": WINDOWS, "min_coverage": 0.0}
    if METHODS.get(settings.get("method", "global")).learns:
        defaults["training"] = {"steps": 2, "held_out": 2, "evaluate_every": 1}
    quantizer = DobiSVDQuantizer(**{**defaults, **settings})
    assert quantizer.quantize_model(model) is model
    return quantizer


def done(quantizer: DobiSVDQuantizer) -> tuple[Plan, CompressionReport]:
    assert quantizer.plan is not None
    assert quantizer.report is not None
    return quantizer.plan, quantizer.report


def logits(model: nn.Module, ids: Tensor = WINDOWS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def relative(found: Tensor, expected: Tensor) -> float:
    """`||found - expected|| / ||expected||`."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_as_planned(model: nn.Module, dense: nn.Module, plan: Plan) -> None:
    """Every target is what the plan says, every other tensor is what it was. The experts of `dense` become linears."""
    found = compressed_linears(model)
    linearize(dense)
    assert found.keys() == {name for name, entry in plan.modules.items() if not entry.leaves_as_is}
    for name, module in found.items():
        entry, old = plan.modules[name], dense.get_submodule(name)
        out_features, in_features = weight_matrix(old).shape
        assert (module.structure, module.encoding) == (entry.structure, entry.encoding)
        assert module.weight.dtype == old.weight.dtype
        shapes = type(module).linears(out_features, in_features, entry.rank)
        children = dict(module.named_children())
        assert {key: (child.out_features, child.in_features) for key, child in children.items()} == shapes
        assert all(child.bias is None for key, child in children.items() if f"{key}.bias" != module.bias_key)
        if entry.encoding == "float":
            for key, child in children.items():
                assert type(child) is nn.Linear
                assert (tuple(child.weight.shape), child.weight.dtype) == (shapes[key], old.weight.dtype)
        assert (module.rank, module.out_features, module.in_features) == (entry.rank, out_features, in_features)
        if old.bias is None:
            assert module.bias is None
        else:
            assert torch.equal(module.bias, old.bias)
    state = model.state_dict()
    for name, tensor in dense.state_dict().items():
        if name.rsplit(".", 1)[0] not in found:
            assert torch.equal(state[name], tensor)


def assert_function_of_factors(model: nn.Module, dense: nn.Module) -> None:
    """The model computes what the dense one would with the factors' products for weights, not what it did before."""
    before = logits(dense)
    for name, module in compressed_linears(model).items():
        product = module.dense_matrix().detach()
        old = dense.get_submodule(name)
        old.weight.data = product.T if type(old) is Conv1D else product
    assert relative(logits(model), logits(dense)) < 1e-4
    assert relative(logits(model), before) > 0.01


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "tensors": {name: (id(tensor), tensor.detach().clone()) for name, tensor in model.named_parameters()},
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks), m.training) for m in model.modules()],
        "config": model.config.to_dict(),
        "extras": sorted(vars(model)),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert {key: after[key] for key in after if key != "tensors"} == {
        key: before[key] for key in before if key != "tensors"
    }
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, tensor) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert torch.equal(after["tensors"][name][1].nan_to_num(), tensor.nan_to_num())


def refused(model: nn.Module, match: str, error: type[Exception] = ValueError, **settings: Any) -> None:
    """Compressing raises an error of these words and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        compress(model, **settings)
    assert_untouched(model, before)
