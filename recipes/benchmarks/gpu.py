"""Everything that wants a GPU, in one run of at most eight minutes: JSON lines, each written as soon as it is known.

    python -m recipes.benchmarks.gpu --out gpu.jsonl                       # from the checkout; one H100 or H200
    python -m recipes.benchmarks.gpu --out gpu.jsonl --steps pairs tests   # some of it
    python -m recipes.benchmarks.gpu --dry-run                             # its logic: tiny shapes, CPU, interpreter

Steps are run in the order of their importance, each in a process of its own that is ended at its limit; what it has
written stays. No network is needed, nor an installation of this package: PyTorch with CUDA, Triton, transformers,
accelerate, psutil, PyYAML, rich and tqdm, and for the tests pytest and hypothesis. GemLite, gptqmodel and
bitsandbytes are measured or tested where they are installed.

* `correctness`: matrices of 7B models by the kernels for few rows, against float64; the library's error beside it
* `decode-pivoted`, `decode-int8`: random weights in the shape of a 7B model, 16 of its 32 blocks, since each takes
  seconds to compile; dense compiled, and compressed with `optimize_for_inference` and compiled: by turns, with the
  share of the machine's bound that each reaches
* `pairs`: a matrix as a pair of products, by cuBLAS, the kernels and GemLite: microseconds as CUDA graphs replay them
* `tests`: the repository's tests that need a GPU, and learned rounding there
* `memory-limit`: `recipes/memory_limit.yaml`
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, optimize_for_inference
from optimum_dobisvd.benchmark.bounds import bound_of, measure_machine
from optimum_dobisvd.benchmark.generation import Cell
from optimum_dobisvd.benchmark.result import Row, figures
from optimum_dobisvd.benchmark.rounds import Patience, measure_rounds
from optimum_dobisvd.benchmark.synthetic import SyntheticModel
from optimum_dobisvd.benchmark.worker import ModelRequest, Worker
from optimum_dobisvd.commands.run import read_steps
from optimum_dobisvd.inference import thin_linear, thin_product
from optimum_dobisvd.inference.device_time import cold_copies, seconds_of
from optimum_dobisvd.inference.thin_linear import ThinLinear, faster_by_kernel
from optimum_dobisvd.structures.format import format_named

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 480
MATRICES = ((4096, 4096), (11008, 4096), (4096, 11008))
FORMATS = (
    ("pivoted", "float", 0.5),
    ("low_rank", "int8", 0.25),
    ("low_rank", "float", 0.5),
    ("pivoted", "int8", 0.25),
)
"""Structure, encoding, share of the bytes in 16 bits."""
INTERPRETED = ("correctness", "pairs")
"""In a dry run, by Triton's interpreter; others take what a CPU takes."""
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
}
Lines = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        device: where.
        matrices: outputs and inputs.
        formats: structure, encoding, share of the 16-bit bytes.
        rows: of a product.
        shape: fields of the synthetic model that differ from Llama's.
        prompts, new_tokens: of a generation.
        compiled: whether generation is compiled.
        tolerance: of errors. Triton's interpreter cuts bfloat16 off where a GPU rounds it.
        patience: of a comparison.
    """

    device: str = "cuda"
    matrices: tuple[tuple[int, int], ...] = MATRICES
    formats: tuple[tuple[str, str, float], ...] = FORMATS
    rows: tuple[int, ...] = (1, 4, 16)
    shape: tuple[tuple[str, int], ...] = (("num_hidden_layers", 16),)
    prompts: tuple[int, ...] = (512, 32)
    new_tokens: int = 32
    compiled: bool = True
    tolerance: float = 5e-3
    patience: Patience = field(default_factory=lambda: Patience(rounds=5, attempts=2, seconds=15))


DRY = Scale(
    "cpu",
    ((48, 64),),
    FORMATS[:2],
    (1, 4),
    tuple(TINY.items()),
    (6,),
    3,
    compiled=False,
    tolerance=1e-2,
    patience=Patience(3, 1, 1),
)


def correctness(scale: Scale) -> Lines:
    """Norm of the error over norm of the result, by the kernels and by the library."""
    torch.manual_seed(0)
    for matrix in scale.matrices:
        for structure, encoding, keep in scale.formats:
            module, kept = made(structure, encoding, keep, matrix, scale.device)
            by_kernel = with_kernels(module)
            exact_matrix = module.dense_matrix().double()
            for rows in scale.rows:
                x = torch.randn(rows, matrix[1], device=scale.device).bfloat16()
                exact = x.double() @ exact_matrix.T + (0 if module.bias is None else module.bias.double())
                torch.full((rows, matrix[0]), torch.nan, device=scale.device).bfloat16()  # what outputs may land on
                errors = {name: error(each(x), exact) for name, each in (("kernel", by_kernel), ("library", module))}
                right = errors["kernel"] < max(2 * errors["library"], scale.tolerance)
                yield {**kept, "rows": rows, "errors": errors, "right": right}


def decode(scale: Scale, structure: str, quantization: str | None, keep: float) -> Lines:
    """A model beside the dense one, both compiled."""
    wanted = SyntheticModel("llama-7b", dict(scale.shape), torch.bfloat16, structure, quantization, keep)
    device = torch.device(scale.device)
    faster = partial(optimize_for_inference, rows=(1, max(scale.prompts)))
    rows = [Row("dense", "dense", scale.compiled), Row("compressed", "compressed", scale.compiled, against="dense")]
    workers, traffic = {}, {}
    for name, make, optimize in (("dense", wanted.dense, None), ("compressed", wanted.compressed, faster)):
        begun = time.perf_counter()
        request = ModelRequest(partial(make, scale.device), scale.device, "sdpa", scale.new_tokens, optimize=optimize)
        workers[name] = Worker(request)
        loaded = workers[name].load()
        traffic[name] = workers[name].traffic()
        thin = [module for module in workers[name].model.modules() if isinstance(module, ThinLinear)]
        yield {
            "model": name,
            "seconds": time.perf_counter() - begun,
            "weight_bytes": loaded.weight_bytes,
            "by_kernel": len(thin),
        }
    yield {"ratios": [[*map(str, key), ratio] for key, ratio in thin_linear.RATIOS.items()]}
    yield {"tiles": [[*map(str, key), asdict(tile)] for key, tile in thin_product.TILES.items()]}
    machine = measure_machine(device, torch.bfloat16)
    yield {"machine": asdict(machine)}
    for prompt in scale.prompts:
        cell = Cell(1, prompt)
        cold = {row.name: workers[row.worker].cold(cell, row.compiled) for row in rows}
        yield {"prompt": prompt, "cold": {name: [each.timing.total, each.note] for name, each in cold.items()}}

        def run(name: str, cell: Cell = cell) -> Any:
            return workers[name].run(cell, scale.compiled)

        rounds = measure_rounds([row.name for row in rows], run, scale.patience)
        for row in rows:
            bound = bound_of(traffic[row.worker], cell, scale.new_tokens, machine)
            found = figures(row, cell, rounds, (cold[row.name].timing, cold[row.name].peak), bound)
            reached = {"first_reached": found.first_reached, "gap_reached": found.gap_reached}
            yield {**asdict(found), **reached, "noise": rounds.noise}


def pairs(scale: Scale) -> Lines:
    """Microseconds of a product, weights from memory, by each that computes it, and the dense one."""
    machine = measure_machine(torch.device(scale.device), torch.bfloat16)
    yield {"machine": asdict(machine)}
    for matrix in scale.matrices:
        for structure, encoding, keep in scale.formats:
            count = cold_copies(int(keep * 2 * matrix[0] * matrix[1]), torch.device(scale.device))
            modules, kept = zip(
                *(made(structure, encoding, keep, matrix, scale.device) for _ in range(count)), strict=True
            )
            size = sum(tensor.nbytes for tensor in modules[0].parameters())
            for rows in scale.rows:
                x = torch.randn(rows, matrix[1], device=scale.device).bfloat16()
                for name, child in modules[0].named_children():  # finds the tiles
                    encoded = format_named(structure, encoding).encoding
                    faster_by_kernel(child, encoded, [rows], modules[0].output_places(name))
                kinds: dict[str, Callable[[nn.Module], nn.Module]] = {
                    "library": lambda module: module,
                    "kernel": with_kernels,
                    "dense": lambda module: dense_like(module),
                    "gemlite": by_gemlite,
                }
                found: dict[str, Any] = {}
                for name, change in kinds.items():
                    try:
                        changed = [change(module) for module in modules]
                        found[name] = 1e6 * seconds_of(lambda module, x=x: module(x), changed)
                    except Exception as failure:
                        found[name] = f"{type(failure).__name__}: {failure}"[:200]
                yield {**kept[0], "rows": rows, "microseconds": found, "bound": 1e6 * size / machine.bandwidth}


def tests(scale: Scale) -> Lines:
    """The tests that need a GPU, and codes learned on one."""
    import pytest

    folder = ROOT / "integration_tests"
    files = ("inference/test_thin_product.py", "encodings/test_int8_matmul.py", "quantization/test_on_cuda.py")
    for file in files if scale.device == "cuda" else files[2:]:
        begun = time.perf_counter()
        arguments = ["-q", "-p", "no:cacheprovider", "-k", "gpu or cuda", f"--rootdir={ROOT}", str(folder / file)]
        code = pytest.main(arguments)
        yield {"tests": file, "exit_code": int(code), "seconds": time.perf_counter() - begun}
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, bos_token_id=1, eos_token_id=2)).to(scale.device).eval()
    ids = torch.randint(2, 96, (8, 24))
    settings = {"steps": 8, "batch_size": 4}
    config = DobiSVDConfig(
        ratio=0.4,
        dataset=ids,
        quantization="int8",
        rounding="learned",
        rounding_settings=settings,
        structure="pivoted",
    )
    begun = time.perf_counter()
    model = DobiSVDQuantizer(config).quantize_model(model)
    with torch.no_grad():
        finite = bool(torch.isfinite(model(ids.to(scale.device)).logits).all())
    yield {"learned_rounding": finite, "seconds": time.perf_counter() - begun}


def memory_limit(scale: Scale) -> Lines:
    """Every step of the recipe."""
    from rich.console import Console

    changes = []
    if scale.device == "cpu":
        shape = json.dumps({**TINY, "hidden_size": 128, "intermediate_size": 256})
        changes = [f"shape={shape}", "device=cpu", "dtype=float32", "memory=2MB", "prompt=[6]", "new_tokens=3"]
        changes += ["keep=0.5", "rows=[dense, checkpoint]"]
    steps = read_steps(str(ROOT / "recipes" / "memory_limit.yaml"), changes)
    for spec, options in steps[: 1 if scale.device == "cpu" else None]:
        yield {spec.name: spec.execute(options, Console(stderr=True))}


STEPS: dict[str, tuple[int, Callable[[Scale], Lines]]] = {
    "correctness": (50, correctness),
    "decode-pivoted": (145, partial(decode, structure="pivoted", quantization=None, keep=0.5)),
    "decode-int8": (115, partial(decode, structure="low_rank", quantization="int8", keep=0.25)),
    "pairs": (60, pairs),
    "tests": (70, tests),
    "memory-limit": (120, memory_limit),
}
"""With the most seconds of each."""


def made(
    structure: str, encoding: str, keep: float, matrix: tuple[int, int], device: str
) -> tuple[Any, dict[str, Any]]:
    """A matrix of random values, of the largest rank that keeps that share of its 16-bit bytes; and what it is."""
    format = format_named(structure, encoding)
    most = keep * 2 * matrix[0] * matrix[1]
    ranks = range(16, min(matrix), 16)
    rank = max((rank for rank in ranks if format.bytes(*matrix, rank, 2) <= most), default=16)
    plain = nn.Linear(matrix[1], matrix[0], bias=True, device="meta", dtype=torch.bfloat16)
    module = format.empty(plain, rank).to_empty(device=device)
    for tensor in module.parameters():
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02) if tensor.dim() > 1 else tensor.data.uniform_(0.1, 1)
        else:
            tensor.data.random_(-127, 128)
    for tensor in module.own().values():
        tensor.copy_(torch.randperm(len(tensor)))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.set_inference(True)
    return module.eval(), {"structure": structure, "encoding": encoding, "matrix": matrix, "rank": rank}


def with_kernels(module: Any) -> nn.Module:
    """A module of the same tensors whose products of few rows go through the kernels."""
    return _with_children(module, ThinLinear)


def by_gemlite(module: Any) -> nn.Module:
    """The same, by GemLite's int8 products: only linears in int8."""
    import gemlite.helper

    if any(each.is_floating_point() and each.dim() > 1 for each in module.parameters()):
        raise ValueError("for linears in int8 alone")
    make = getattr(gemlite.helper, "A16W8_INT8", None) or gemlite.helper.A16W8
    dtype, device = module.weight.dtype, str(module.weight.device)

    def replaced(child: Any) -> Any:
        linear = nn.Linear(child.in_features, child.out_features, bias=False, device=device, dtype=dtype)
        linear.weight.data = child.dense_matrix().to(dtype)
        return make(device=device).from_linear(linear)

    return _with_children(module, replaced)


def _with_children(module: Any, change: Callable[[Any], nn.Module]) -> nn.Module:
    kind: Any = type(module)
    new = kind(module.in_features, module.out_features, module.rank, bias=module.bias is not None, device="meta")
    for name, child in module.named_children():
        new.set_submodule(name, change(child))
    new.put_own(module.own(), module.bias)
    new.weight, new.encoding = module.weight, module.encoding
    new.set_inference(True)
    return new.eval()


def dense_like(module: Any) -> nn.Module:
    """A dense linear of the matrix's shape."""
    dtype, device = module.weight.dtype, module.weight.device
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device=device, dtype=dtype)
    return linear.requires_grad_(False)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the error over that of the result; infinite for what is no number."""
    value = float((found.double() - exact).norm() / exact.norm())
    return value if value == value else float("inf")


def write(line: dict[str, Any], out: str | None) -> None:
    """Print a line, and add it to a file."""
    text = json.dumps(line, default=str)
    print(text, flush=True)
    if out is not None:
        with open(out, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()


@torch.inference_mode(False)
def run_step(name: str, scale: Scale, out: str | None) -> None:
    """One step, in this process."""
    _, step = STEPS[name]
    with torch.no_grad() if name != "tests" else torch.enable_grad():
        for line in step(scale):
            write({"step": name, **line}, out)


def run_all(names: list[str], args: argparse.Namespace) -> int:
    """Every step in a process of its own; returns how many failed."""
    ends, failed = time.monotonic() + args.seconds, 0
    for name in names:
        limit = min(STEPS[name][0], ends - time.monotonic())
        if limit <= 5:
            write({"step": name, "done": False, "why": "no time is left"}, args.out)
            continue
        command = [sys.executable, "-m", "recipes.benchmarks.gpu", "--only", name]
        command += [*(["--out", args.out] if args.out else []), *(["--dry-run"] if args.dry_run else [])]
        env = {**os.environ, "TRITON_INTERPRET": "1"} if args.dry_run and name in INTERPRETED else None
        begun = time.monotonic()
        try:
            code: int | str = subprocess.run(command, timeout=limit, check=False, cwd=ROOT, env=env).returncode
        except subprocess.TimeoutExpired:
            code = f"ended at its limit of {limit:.0f} s"
        failed += code != 0
        write({"step": name, "done": code == 0, "why": code, "seconds": time.monotonic() - begun}, args.out)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="a file that lines are added to")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all steps together")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, in Triton's interpreter")
    parser.add_argument("--only", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = None if args.out is None else os.path.abspath(args.out)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run tries the script out without")
    if args.only:
        run_step(args.only, DRY if args.dry_run else Scale(), args.out)
        return
    name = "cpu" if args.dry_run else torch.cuda.get_device_name()
    write({"device": name, "torch": torch.__version__, "seconds": args.seconds}, args.out)
    sys.exit(1 if run_all(args.steps, args) else 0)


if __name__ == "__main__":
    main()
