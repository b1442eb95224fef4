"""Compress and run a model that is larger than the memory of the device, with Accelerate's offload.

Weights that do not fit are kept on the CPU, and beyond that on disk; calibration fetches them block by block.

python examples/device_map_offload.py --model Qwen/Qwen3-0.6B --dataset wikitext2 --max-memory 1GB --out qwen3-0.8
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dobisvd import DobiSVDConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
parser.add_argument("--dataset", default="wikitext2", help="a name (wikitext2, c4, ptb) or a text file")
parser.add_argument("--max-memory", default="1GB", help="for weights, on the GPU if there is one, else on the CPU")
parser.add_argument("--nsamples", type=int, default=128)
parser.add_argument("--seqlen", type=int, default=2048)
parser.add_argument("--out", default="qwen3-0.8")
args = parser.parse_args()

placement = {
    "device_map": "auto",
    "max_memory": {0 if torch.cuda.is_available() else "cpu": args.max_memory},
}
if torch.cuda.is_available():
    placement["max_memory"]["cpu"] = "64GB"

tokenizer = AutoTokenizer.from_pretrained(args.model)
config = DobiSVDConfig(
    method="svd_llm_v2",
    ratio=0.8,
    dataset=args.dataset,
    tokenizer=tokenizer,
    nsamples=args.nsamples,
    seqlen=args.seqlen,
)
with tempfile.TemporaryDirectory() as folder:
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=config, offload_folder=folder, **placement
    )
    placed = getattr(model, "hf_device_map", {"": model.device})  # there is no map where all of it fits on one device
    print("dense weights were spread over", sorted({str(place) for place in placed.values()}))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

with tempfile.TemporaryDirectory() as folder:
    model = AutoModelForCausalLM.from_pretrained(args.out, offload_folder=folder, **placement)
    inputs = tokenizer("The state of the Union is", return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(tokens[0]))
