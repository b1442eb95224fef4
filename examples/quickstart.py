"""Compress a model, save it, load it again, and let it speak.

python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset wikitext2 --out smollm2-0.8
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dobisvd import DobiSVDQuantizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--dataset", default="wikitext2", help="a name (wikitext2, c4, ptb) or a text file")
parser.add_argument("--ratio", type=float, default=0.8, help="fraction of the bytes to keep")
parser.add_argument("--nsamples", type=int, default=128)
parser.add_argument("--seqlen", type=int, default=2048)
parser.add_argument("--out", default="smollm2-0.8")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)

quantizer = DobiSVDQuantizer(
    method="svd_llm_v2", ratio=args.ratio, dataset=args.dataset, nsamples=args.nsamples, seqlen=args.seqlen
)
quantizer.quantize_model(model, tokenizer)
quantizer.save(model, args.out)
tokenizer.save_pretrained(args.out)
ratios = quantizer.report.to_dict()["ratios"]
print(f"kept {ratios['target_bytes']:.1%} of the bytes of the compressed matrices, {ratios['model_bytes']:.1%} of all")

model = AutoModelForCausalLM.from_pretrained(args.out)
inputs = tokenizer("The state of the Union is", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(tokens[0]))
