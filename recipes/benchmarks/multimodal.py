"""Models that read an image before the text, dense and compressed: next-token accuracy and tokens per second.

    python recipes/benchmarks/multimodal.py [--ratios 0.8 0.6 0.4] [--nontext]
    python recipes/benchmarks/multimodal.py --model DIR_OR_ID --rows rows.jsonl [--device cuda]

What Dobi-SVD's Tables 22 to 24 show of LLaVA and OpenVLA. Without `--model` it is a tiny action model, as OpenVLA is
one: a Llama with a vision prefix, trained here in seconds to answer an image with a row of action tokens. With it, any
model of `AutoModelForImageTextToText`; a line of the rows is `{"image": PATH, "prompt": ..., "answer": ...}`, and
accuracy is that of the answer's tokens. The first half of the rows calibrates, the second half is measured.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer

Batch = dict[str, Tensor]
IMAGE_TOKEN, PATCHES, ACTIONS, ACTION_TOKENS = 1, 4, 7, 32
_NO_LABEL = -100


def tiny_action_model() -> Any:
    """Return an untrained Llama of two blocks with a vision prefix."""
    text = {"model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    tower = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 64}
    config = AutoConfig.for_model(
        "llava", text_config=text, vision_config=tower, image_token_index=IMAGE_TOKEN, image_seq_length=PATCHES
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config)


def demonstrations(count: int, seed: int) -> list[Batch]:
    """Return images with the actions that answer them: each is the quadrant's mean color, in bins, at some place."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        colors = torch.rand(3, 2, 2, generator=generator)
        pixels = colors.repeat_interleave(4, 1).repeat_interleave(4, 2) * 4 - 2
        actions = (colors.flatten()[:ACTIONS] * 4).long() + ACTION_TOKENS
        prompt = torch.tensor([2, *[IMAGE_TOKEN] * PATCHES, *range(10, 16)])
        ids = torch.cat([prompt, actions])[None]
        labels = ids.clone()
        labels[:, : len(prompt)] = _NO_LABEL
        mask = torch.ones_like(ids)
        batches.append({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels[None], "labels": labels})
    return batches


def train(model: Any, batches: list[Batch], steps: int, rows: int = 32) -> None:
    """Train on the labels."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(batches), (rows,), generator=generator).tolist()
        loss = model(**{key: torch.cat([batches[i][key] for i in chosen]) for key in batches[0]}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def read_rows(path: Path, processor: Any) -> list[Batch]:
    """Return what the processor makes of every row; the prompt has no labels."""
    from PIL import Image

    batches = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        with Image.open(path.parent / row["image"]) as image:
            prompt, whole = (
                processor(text=text, images=image, return_tensors="pt")
                for text in (row["prompt"], row["prompt"] + row["answer"])
            )
        labels = whole["input_ids"].clone()
        labels[:, : prompt["input_ids"].shape[1]] = _NO_LABEL
        batches.append({**whole, "labels": labels})
    return batches


@torch.no_grad()
def measure(model: nn.Module, batches: list[Batch], device: str) -> tuple[float, float]:
    """Return the share of labels that are the likeliest token, and tokens read per second."""
    right = wanted = read = 0
    model.to(device).eval()
    model(**{key: value.to(device) for key, value in batches[0].items()})  # to warm up
    begin = time.perf_counter()
    for batch in batches:
        logits: Any = model(**{key: value.to(device) for key, value in batch.items() if key != "labels"}).logits
        labels = batch["labels"][:, 1:].to(device)
        right += int((logits[:, :-1].argmax(-1) == labels)[labels != _NO_LABEL].sum())
        wanted += int((labels != _NO_LABEL).sum())
        read += batch["input_ids"].numel()
    return right / wanted, read / (time.perf_counter() - begin)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model with its processor (default: the tiny action model)")
    parser.add_argument("--rows", type=Path, help="images with prompts and answers, one JSON object a line")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.8, 0.6, 0.4])
    parser.add_argument("--method", default="global")
    parser.add_argument("--nontext", action="store_true", help="compress the tower and the projector, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=300, help="of the tiny model's training")
    args = parser.parse_args()
    if (args.model is None) != (args.rows is None):
        parser.error("--model and --rows are for each other")
    if args.model is None:
        dense, batches = tiny_action_model(), demonstrations(512, seed=1)
        train(dense, demonstrations(2048, seed=0), args.steps)
    else:
        dense = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
        batches = read_rows(args.rows, AutoProcessor.from_pretrained(args.model))
    calibration, held_out = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    print("| ratio | next-token accuracy | tokens/s |\n|---|---|---|")
    for ratio in (None, *args.ratios):
        model = dense
        if ratio is not None:
            settings = {"dataset": calibration, "nsamples": len(calibration), "nontext_modules": args.nontext}
            config = DobiSVDConfig(method=args.method, ratio=ratio, min_coverage=0.0, **settings)
            model = DobiSVDQuantizer(config).quantize_model(copy.deepcopy(dense.cpu()))
        accuracy, speed = measure(model, held_out, args.device)
        print(f"| {'dense' if ratio is None else ratio} | {accuracy:.3f} | {speed:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
