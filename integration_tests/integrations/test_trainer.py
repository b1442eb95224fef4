"""transformers' Trainer on compressed models: bare factors, and adapters."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from integration_tests.checkpoint.reloading import logits
from integration_tests.integrations.test_peft import (
    EIGHT_BIT,
    assert_fresh_process_gives,
    in_part,
    load,
    lora,
)
from integration_tests.tiny_models import tokens

peft = pytest.importorskip("peft", reason="peft is not installed")

PURELY_QUANTIZED = "You cannot perform fine-tuning on purely quantized models"


def trainer(model, folder, **settings):
    data = [{"input_ids": row, "labels": row} for row in tokens(12, 24)]
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_steps": 2, "seed": 0}
    arguments = {**defaults, "report_to": [], "use_cpu": True, "disable_tqdm": True, **settings}
    settings = TrainingArguments(output_dir=str(folder), **arguments)
    return Trainer(model=model, args=settings, train_dataset=data, eval_dataset=data)


def test_trainer_on_bare_factors(saved, tmp_path):
    expected = []
    for name, structure in (
        ("llama", "low_rank"),
        ("llama_tied", "low_rank"),
        ("gpt2", "low_rank"),
        ("qwen2", "pivoted"),
    ):
        base = saved(name, structure=structure)
        run = trainer(load(base), tmp_path / name)
        run.train()
        run.save_model(str(tmp_path / f"{name}-trained"))
        trained = logits(run.model.eval())
        assert not torch.equal(trained, logits(load(base)))
        expected.append((tmp_path / f"{name}-trained", "model", trained))
        expected.append((tmp_path / name / "checkpoint-4", "model", trained))

        resumed = trainer(load(base), tmp_path / name)
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        assert torch.equal(logits(resumed.model.eval()), trained), name
    assert_fresh_process_gives(expected, tmp_path)


@pytest.mark.parametrize("structure", ["low_rank", "pivoted"])
def test_trainer_in_mixed_precision(saved, structure, tmp_path):
    model = load(saved("qwen2", structure=structure))
    before = logits(model)
    run = trainer(model, tmp_path, bf16=True, gradient_checkpointing=True, max_steps=2)
    assert math.isfinite(run.train().training_loss)
    assert not torch.equal(logits(run.model.eval()), before)


def test_trainer_goes_back_to_the_best_checkpoint(saved, tmp_path):
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(load(saved("llama")), tmp_path, learning_rate=3e-2, save_total_limit=2, **every_step, **worst)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    assert torch.equal(logits(run.model.eval()), logits(load(run.state.best_model_checkpoint)))


@pytest.mark.parametrize("encoding", EIGHT_BIT)
def test_trainer_refuses_8_bit_models_without_an_adapter(encoding, tmp_path):
    with pytest.raises(ValueError, match=PURELY_QUANTIZED):
        trainer(in_part(tmp_path / "base", encoding), tmp_path / "run")
    added = load(tmp_path / "base")
    added.add_adapter(lora("all-linear"))
    for model in (peft.get_peft_model(load(tmp_path / "base"), lora("all-linear")), added):
        before = logits(model)
        run = trainer(model, tmp_path / "run")
        run.train()
        assert not torch.equal(logits(model.eval()), before)
        assert (tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors").exists()
        assert not (tmp_path / "run" / "checkpoint-4" / "model.safetensors").exists()


def test_trainer_resumes_adapters(saved, tmp_path):
    first = peft.get_peft_model(load(saved("qwen2")), lora("all-linear"))
    trainer(first, tmp_path / "run").train()
    second = peft.get_peft_model(load(saved("qwen2")), lora("all-linear"))
    trainer(second, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(second.eval()), logits(first.eval()))
    assert_fresh_process_gives([(tmp_path / "run" / "checkpoint-4", "adapter", logits(first))], tmp_path)


@pytest.mark.parametrize("encoding", ["float", *EIGHT_BIT])
def test_prepare_model_for_kbit_training(encoding, tmp_path):
    """What a user of QLoRA calls first: floats become float32, the 8-bit tensors stay."""
    in_part(tmp_path / "base", encoding, torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(load(tmp_path / "base"))
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floats == {torch.float32}
    assert torch.equal(logits(model), logits(load(tmp_path / "base", dtype=torch.float32)))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model = peft.get_peft_model(model, lora("all-linear"))
    run = trainer(model, tmp_path / "run", gradient_checkpointing=True)
    run.train()
    healed = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert torch.equal(logits(again), healed)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))
