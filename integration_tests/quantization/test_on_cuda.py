"""Low rank stored by GPTQ or bitsandbytes, made, reloaded, split and trained on a GPU."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from integration_tests.fresh_processes import run_python
from integration_tests.quantization.quantized_models import SETTINGS, encodings_of, marked, quantized, wide
from integration_tests.tiny_models import tokens
from optimum_dobisvd import adapter_targets
from optimum_dobisvd.structures.base import CompressedLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KEYS = marked(*SETTINGS)
RELOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
found = {}
for place in ("cuda", "auto"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map=place)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}, place
    with torch.no_grad():
        found[place] = model(input_ids=torch.arange(2, 26, device="cuda").view(2, 12)).logits.contiguous()
save_file(found, sys.argv[2])
"""


def quantized_on_gpu(folder, key, dtype):
    return quantized(folder, key, dtype, device_map="cuda")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 26, device="cuda").view(2, 12)).logits.cpu()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "llama_tied"])
def test_every_encoding_is_made_on_the_gpu_and_reloads_there_bit_for_bit_in_a_new_process(key, name, tmp_path):
    wide(name).save_pretrained(tmp_path / "dense")
    model = quantized_on_gpu(tmp_path / "dense", key, torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    found = {module.encoding for module in model.modules() if isinstance(module, CompressedLinear)}
    assert found == encodings_of(key)
    if name == "llama_tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    before = logits(model)
    assert bool(torch.isfinite(before).all())
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), before)
    done = run_python(RELOAD, str(tmp_path / "out"), str(tmp_path / "logits"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "logits")
    assert all(torch.equal(found[place].cpu(), before) for place in ("cuda", "auto"))


@pytest.mark.parametrize("key", KEYS)
def test_what_was_made_on_the_gpu_computes_the_same_on_a_cpu_and_is_saved_from_there_alike(key, tmp_path):
    wide("llama").save_pretrained(tmp_path / "dense")
    model = quantized_on_gpu(tmp_path / "dense", key, torch.float32)
    model.save_pretrained(tmp_path / "out")
    home = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    with torch.no_grad():
        there = home(input_ids=torch.arange(2, 26).view(2, 12)).logits
    # LLM.int8() computes in 16 bits on a GPU, and from activations in 8.
    assert (there - logits(model)).norm() < (0.05 if key == "llm_int8" else 1e-3) * there.norm()
    home.save_pretrained(tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


REFUSALS = {"gptq": "GPTQ cannot be offloaded", "nf4": "fp32_cpu_offload", "llm_int8": "fp32_cpu_offload"}


@pytest.mark.parametrize("key", marked(*REFUSALS))
def test_lying_half_beside_the_gpu_is_refused_in_words(key, tmp_path):
    wide("llama").save_pretrained(tmp_path / "dense")
    quantized_on_gpu(tmp_path / "dense", key, torch.float32).save_pretrained(tmp_path / "out")
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
    places |= {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    with pytest.raises(ValueError, match=REFUSALS[key]):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=places)
    if key == "gptq":  # as `auto` would have it where the GPU is small
        half = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) // 2
        with pytest.raises(ValueError, match="linears quantized by GPTQ cannot be offloaded"):
            AutoModelForCausalLM.from_pretrained(
                tmp_path / "out", device_map="auto", max_memory={0: half, "cpu": 10**10}
            )


@pytest.mark.parametrize("key", KEYS)
def test_the_trainer_trains_an_adapter_on_the_gpu(key, tmp_path):
    wide("llama").save_pretrained(tmp_path / "dense")
    quantized_on_gpu(tmp_path / "dense", key, torch.bfloat16).save_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cuda")
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=adapter_targets(base)))
    ids = tokens(8, 24)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=8, learning_rate=1e-2, logging_steps=1, report_to=[]
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", device_map="cuda").eval()
    assert torch.equal(logits(again), expected)
