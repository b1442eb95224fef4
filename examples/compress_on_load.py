"""Compress while loading, as with any other quantization of transformers, and try a second ratio for free.

The statistics folder keeps what calibration found: the second model needs no pass over the text.

python examples/compress_on_load.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset wikitext2 --out smollm2
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dobisvd import DobiSVDConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--dataset", default="wikitext2", help="a name (wikitext2, c4, ptb) or a text file")
parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6], help="fractions of the bytes to keep")
parser.add_argument("--nsamples", type=int, default=128)
parser.add_argument("--seqlen", type=int, default=2048)
parser.add_argument("--device-map", default="auto")
parser.add_argument("--out", default="smollm2")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
for ratio in args.ratios:
    config = DobiSVDConfig(
        method="svd_llm_v2",
        ratio=ratio,
        dataset=args.dataset,
        tokenizer=tokenizer,
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        statistics=f"{args.out}-statistics",
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config, device_map=args.device_map)
    folder = f"{args.out}-{ratio:g}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")
