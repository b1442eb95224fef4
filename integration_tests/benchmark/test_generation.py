"""One generation: its marks of time, and what of it is compiled."""

import pytest
import torch

from integration_tests.tiny_models import tiny
from optimum_dobisvd.benchmark import generation
from optimum_dobisvd.benchmark.generation import Cell, compiled_forward, generate, using_forward
from optimum_dobisvd.benchmark.matrices import MatrixTime, matrix_times, medians, slow_matrices

CPU = torch.device("cpu")


@pytest.mark.parametrize("static", [False, True])
def test_every_sequence_gets_all_its_tokens_even_if_it_ends_before(static: bool) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # the first token of the vocabulary, which ends a sequence, is always the next
    assert model.generation_config.eos_token_id == 0
    timing = generate(model, Cell(2, 5), 7, CPU, static=static)
    assert len(timing.gaps) == 6
    assert timing.first > 0
    assert timing.total == pytest.approx(timing.first + sum(timing.gaps))


def test_steps_are_compiled_and_prompts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths, asked = tiny("llama"), [], {}

    def compile(forward, **settings):
        asked.update(settings)

        def compiled(*args, **kwargs):
            lengths.append(kwargs["input_ids"].shape[-1])
            return forward(*args, **kwargs)

        return compiled

    monkeypatch.setattr(generation.torch, "compile", compile)
    forward = compiled_forward(model, fullgraph=True)
    with using_forward(model, forward):
        generate(model, Cell(1, 5), 4, CPU, static=True)
    assert lengths == [1, 1, 1]
    assert asked == {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}
    generate(model, Cell(1, 5), 4, CPU)
    assert len(lengths) == 3, "afterwards the model is as it was"


def test_a_forward_that_the_model_had_is_put_back() -> None:
    model = tiny("llama")
    model.forward = own = model.forward
    with using_forward(model, lambda *args, **kwargs: None):
        pass
    assert model.forward is own


def test_every_matrix_is_timed() -> None:
    model = tiny("llama")
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = matrix_times(model, [*names, "model.layers.9.mlp"], Cell(1, 5), 4, CPU)
    assert set(found) == set(names)
    assert all(each.first > 0 and each.gap > 0 for each in found.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_matrices_that_take_longer_are_named_with_what_they_cost() -> None:
    dense = {name: MatrixTime(0.010, 0.0010) for name in ("q", "k", "v", "alone in it")}
    compressed = medians(
        [
            {"q": MatrixTime(0.005, 0.0005), "k": MatrixTime(0.012, gap), "v": MatrixTime(0.0102, 0.00103)}
            for gap in (0.002, 0.003, 9)
        ]
    )
    (slow,) = slow_matrices(dense, {**compressed, "expert": MatrixTime(1, 1)})
    assert slow.name == "k"
    assert (slow.first, slow.gap) == pytest.approx((0.002, 0.002))
    assert (slow.first_times, slow.gap_times) == pytest.approx((1.2, 3.0))
