"""Heal a compressed model on text: train LoRA adapters on its factors, with perplexity before and after.

A dense model is compressed first, to OUT-base. The adapter lies in OUT afterwards and loads with peft's
AutoPeftModelForCausalLM; --merge writes the healed checkpoint to OUT-merged, as small as the compressed one. --bare
trains the factors themselves instead of adapters, and OUT is the healed checkpoint. Weights are float32 in training.

python examples/heal_with_lora.py --model smollm2-0.6 --text wikitext2 --eval-text wikitext2 c4 --out smollm2-0.6-lora
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from optimum_dobisvd import DobiSVDConfig, adapter_targets
from optimum_dobisvd.calibration.dataset import read_text
from optimum_dobisvd.evaluation.perplexity import perplexity, window_ids
from optimum_dobisvd.structures.base import compressed_linears

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2-0.6", help="a compressed checkpoint, or a dense model")
parser.add_argument("--ratio", type=float, default=0.6, help="what to keep of a dense model")
parser.add_argument("--nsamples", type=int, default=64, help="windows to calibrate a dense model on")
parser.add_argument("--text", default="wikitext2", help="to train on: a name (wikitext2, c4, ptb) or a text file")
parser.add_argument("--eval-text", nargs="+", default=["wikitext2", "c4"], help="to measure on: names or text files")
parser.add_argument("--out", default="smollm2-0.6-lora")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--batch-size", type=int, default=2, help="windows per step")
parser.add_argument("--seqlen", type=int, default=512, help="tokens in a window")
parser.add_argument("--eval-windows", type=int, default=8, help="windows of each text to measure on, twice as long")
parser.add_argument("--rank", type=int, default=16, help="of the adapters")
parser.add_argument("--lr", type=float, help="learning rate (default: 1e-3, and 2e-4 with --bare)")
parser.add_argument("--merge", action="store_true", help="write the merged checkpoint, too")
parser.add_argument("--bare", action="store_true", help="train the factors themselves")
args = parser.parse_args()

tokenizer, base = AutoTokenizer.from_pretrained(args.model), args.model
if getattr(AutoConfig.from_pretrained(base), "quantization_config", None) is None:
    config = DobiSVDConfig(
        ratio=args.ratio, dataset=args.text, tokenizer=tokenizer, nsamples=args.nsamples, seqlen=2 * args.seqlen
    )
    base = f"{args.out}-base"
    AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config).save_pretrained(base)
    tokenizer.save_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
quantized_as = model.config.quantization_config.foreign_encodings  # encodings of GPTQ or bitsandbytes, if any
if args.merge and any(name.startswith("gptq") for name in quantized_as):
    parser.error("PEFT merges nothing into GPTQ's linears: keep the adapter beside them, and leave --merge out")
if args.bare and quantized_as:
    parser.error(f"--bare trains factors in 16 bits, and these are stored as {', '.join(quantized_as)}: leave it out")

if args.bare:
    model.requires_grad_(False)
    for module in compressed_linears(model).values():
        if module.rank is not None:
            module.requires_grad_(True)
else:
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=adapter_targets(model), task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

evaluated = {name: read_text(name, "test") for name in args.eval_text}


def measure(when: str) -> None:
    for name, text in evaluated.items():
        found = perplexity(model, tokenizer, text, seqlen=2 * args.seqlen, windows=args.eval_windows)
        print(f"perplexity of {name} {when}: {found:.2f}", flush=True)


def save(healed: torch.nn.Module, folder: str) -> None:
    healed.config.use_cache = True  # Trainer turned it off
    if not quantized_as:  # quantized weights have dtypes of their own
        healed = healed.to(AutoConfig.from_pretrained(base).dtype)
    healed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


measure("before")
windows = window_ids(tokenizer, read_text(args.text, "train"), seqlen=args.seqlen)
settings = TrainingArguments(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=args.batch_size,
    learning_rate=args.lr or (2e-4 if args.bare else 1e-3),
    lr_scheduler_type="cosine",
    warmup_steps=args.steps // 10,
    logging_steps=max(1, args.steps // 10),
    save_strategy="no",
    report_to=[],
)
data = [{"input_ids": window, "labels": window} for window in windows]
Trainer(model=model, args=settings, train_dataset=data).train()
measure("after")

if args.bare:
    save(model, args.out)
else:
    model.save_pretrained(args.out)  # the adapter alone
    if args.merge:
        save(model.merge_and_unload(), f"{args.out}-merged")
