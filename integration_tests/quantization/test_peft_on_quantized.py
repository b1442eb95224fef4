"""LoRA on linears that GPTQ or bitsandbytes has quantized."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from integration_tests.checkpoint.reloading import assert_reloaded_alike, logits
from integration_tests.fresh_processes import run_python
from integration_tests.quantization.quantized_models import marked, quantized, wide
from integration_tests.tiny_models import tokens
from optimum_dobisvd import adapter_targets
from optimum_dobisvd.structures.base import CompressedLinear

CODE = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(2, 26).view(2, 12)).logits.contiguous()}, sys.argv[2])
"""
BY_GPTQ = ("gptq", "autoround")


@pytest.fixture(params=marked("gptq", "autoround", "nf4", "llm_int8"))
def base(request, tmp_path):
    wide("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantized(tmp_path / "dense", request.param, torch.bfloat16).save_pretrained(tmp_path / "base")
    return request.param, tmp_path / "base"


def adapted(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    targets = adapter_targets(model)
    assert any(name.endswith(".linear") for name in targets)
    assert any(name.endswith(".first") for name in targets)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=targets))


def test_an_adapter_is_trained_saved_and_reloaded_in_a_new_process(base, tmp_path):
    model = adapted(base[1])
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 1e-2)
    ids, losses = tokens(4, 24), []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    done = run_python(CODE, str(tmp_path / "adapter"), str(tmp_path / "logits"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(load_file(tmp_path / "logits")["logits"], expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), expected)


def test_merging_gives_a_checkpoint_of_the_same_encodings_or_is_refused_in_words(base, tmp_path, caplog):
    key, folder = base
    model = adapted(folder)
    assert ("train and merge before quantizing" in caplog.text) == (key in BY_GPTQ), "told before the training"
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.01)
    if key in BY_GPTQ:
        with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq quantized"):
            model.merge_and_unload()
        return
    unmerged = logits(model.eval())
    merged = model.merge_and_unload()
    # Merging rounds to 4 or 8 bits anew.
    assert (logits(merged) - unmerged).norm() < 0.5 * unmerged.norm()
    assert {module.encoding for module in merged.modules() if isinstance(module, CompressedLinear)} >= {key}
    merged.save_pretrained(tmp_path / "merged")
    assert_reloaded_alike(tmp_path, {"merged": logits(merged)})


def test_a_quantized_model_is_not_cast(base):
    model = AutoModelForCausalLM.from_pretrained(base[1])
    if base[0] == "llm_int8":
        pytest.skip("transformers lets 8-bit models of bitsandbytes be cast")
    with pytest.raises(ValueError, match="cannot cast a|not supported"):
        model.to(torch.float16)
