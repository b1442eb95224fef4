"""Generate with a checkpoint as a stranger would: plain transformers, nothing else.

`generate` hands the text of this file to a new Python process, so that no state of the present one can help.
Reads a JSON request on standard input, writes `{"text": ..., "class": ...}` as the last line of standard output.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

request = json.load(sys.stdin)
trust = request["trust_remote_code"]
tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"], trust_remote_code=trust)
model: Any = AutoModelForCausalLM.from_pretrained(
    request["model"], device_map=request["device"], trust_remote_code=trust
)
inputs = tokenizer(request["prompt"], return_tensors="pt").to(model.device)
with torch.inference_mode():
    tokens = model.generate(
        **inputs, max_new_tokens=request["max_new_tokens"], do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
new = tokens[0, inputs["input_ids"].shape[1] :]
print(json.dumps({"text": tokenizer.decode(new, skip_special_tokens=True), "class": type(model).__name__}))
