"""Codes are learned towards the dense model, whatever low rank and rounding have made of it."""

import pytest
import torch

from integration_tests.quantization.quantized_models import needs_gptq, planned, wide
from integration_tests.tiny_models import tokens
from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer
from optimum_dobisvd.calibration import paired
from optimum_dobisvd.pipeline import learn_rounding


@needs_gptq
@pytest.mark.parametrize("undo_on_error", [True, False])
def test_the_target_of_every_block_is_what_the_dense_one_gives_on_dense_inputs(
    undo_on_error: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoRoundConfig

    model, ids = wide("llama"), tokens(4, 24)
    outputs: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for layer in model.model.layers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    targets: list[torch.Tensor] = []

    def observed(found: list[torch.Tensor], *rest: object) -> paired.BlockPasses:
        targets.append(torch.cat(found))
        return passes(found, *rest)  # type: ignore[arg-type]

    passes = paired.BlockPasses
    monkeypatch.setattr(paired, "BlockPasses", observed)
    config = DobiSVDConfig(
        plan=planned(model, [("gptq2_g32", 32)]),
        dataset=ids,
        quantization=AutoRoundConfig(bits=2, group_size=32, sym=False, iters=1),
    )
    DobiSVDQuantizer(config).quantize_model(model, undo_on_error=undo_on_error)
    assert len(targets) == len(outputs) == 2
    for target, output in zip(targets, outputs, strict=True):
        output = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(target, output.flatten(0, 1), rtol=1e-4, atol=1e-4)


@needs_gptq
def test_codes_do_not_depend_on_what_stands_in_the_padding() -> None:
    from transformers import AutoRoundConfig

    found = []
    for padding in (3, 7):
        model, ids = wide("llama"), tokens(4, 24)
        mask = torch.ones_like(ids)
        mask[::2, 15:] = 0
        config = DobiSVDConfig(
            plan=planned(model, [("gptq2_g32", 32)]),
            dataset=[{"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask}],
            quantization=AutoRoundConfig(bits=2, group_size=32, sym=False, iters=2),
        )
        DobiSVDQuantizer(config).quantize_model(model)
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@needs_gptq
def test_second_linears_begin_from_the_products_of_their_matrix_s_inputs_without_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without these products they would begin as they are, and nothing else would tell."""
    from transformers import AutoRoundConfig

    model, ids = wide("llama"), tokens(4, 24)
    mask = torch.ones_like(ids)
    mask[::2, 15:] = 0
    read: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    hook.remove()
    inputs = read[0][mask.bool()]
    given: dict[str, torch.Tensor | None] = {}

    def observed(name: str, *rest: object) -> object:
        given[name] = rest[-1]  # type: ignore[assignment]
        return make(name, *rest)  # type: ignore[arg-type]

    make = learn_rounding.make_learnable
    monkeypatch.setattr(learn_rounding, "make_learnable", observed)
    plan = planned(model, [("gptq2_g32", 32)])
    config = DobiSVDConfig(
        plan=plan,
        dataset=[{"input_ids": ids, "attention_mask": mask}],
        quantization=AutoRoundConfig(bits=2, group_size=32, sym=False, iters=1),
    )
    DobiSVDQuantizer(config).quantize_model(model)
    assert {name for name, gram in given.items() if gram is not None} == {
        name for name, module in plan.modules.items() if module.rank is not None
    }
    found = given["model.layers.0.self_attn.q_proj"]
    assert found is not None
    torch.testing.assert_close(found, inputs.T @ inputs, rtol=1e-3, atol=1e-3)
