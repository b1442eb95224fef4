"""Speed of products with dense, low-rank and 8-bit weights, all in one run: the table in the README.

    python recipes/benchmarks/int8_kernels.py [--device cuda] [--features 4096] [--rank 1024]
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python recipes/benchmarks/int8_kernels.py   # as an older CPU

Random weights; rounds of all forms in turn, medians of milliseconds. Every round takes the next of several copies of
the weights, so that they come from memory and not from the cache. The forms:

* dense, low rank: in bfloat16; int8, remap: both factors in 8 bits; int8 dense: the whole matrix
* with `kernel`: what the table of kernels chooses by itself; the others are forced

On a GPU the share of the bandwidth bound is printed, too: bytes of the weights over the rate of a large copy.
"""

import argparse
import contextlib
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from optimum_dobisvd.encodings.int8_matmul import KERNEL_CALLS, KERNELS, using_kernel
from optimum_dobisvd.nn.eight_bit_linear import EightBitLinear, Int8Linear, Int8LowRankLinear, RemappedLinear
from optimum_dobisvd.nn.low_rank_linear import LowRankLinear


def forms(features: int, rank: int, device: str) -> dict[str, nn.Module]:
    """One module of every form, weights random."""
    options: dict = {"bias": False, "device": device, "dtype": torch.bfloat16}
    made: dict[str, nn.Module] = {
        "dense": nn.Linear(features, features, **options),
        "low rank": LowRankLinear(features, features, rank, **options),
        "int8 dense": Int8Linear(features, features, **options),
        "int8": Int8LowRankLinear(features, features, rank, **options),
        "remap": RemappedLinear(features, features, rank, **options),
    }
    for module in made.values():
        if isinstance(module, EightBitLinear):
            for tensor in module.tensors().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
                else:
                    info = torch.iinfo(tensor.dtype)
                    tensor.random_(info.min + 1, info.max)
    return made


def weight_bytes(module: nn.Module) -> int:
    """Bytes that one product must read of the module."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def seconds(call: Callable[[], object], device: str) -> float:
    """One call, on the device's own clock where it has one."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def copy_rate(device: str) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * source.numel() / statistics.median(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    copies = [forms(args.features, args.rank, args.device) for _ in range(args.copies)]
    device = torch.cuda.get_device_name() if args.device != "cpu" else torch.backends.cpu.get_cpu_capability()
    print(f"{args.features} x {args.features}, rank {args.rank}, bfloat16, {device}, {platform.machine()}, ", end="")
    print(f"{torch.get_num_threads()} threads, medians of {args.rounds} rounds in ms (and times dense)\n")
    mine = [kernel.name for kernel in KERNELS if kernel.name != ("cpu_int8" if args.device != "cpu" else "triton")]
    columns = [("dense", ""), ("low rank", "")]
    columns += [(name, kernel) for name in ("int8 dense", "int8") for kernel in ("", *mine)] + [("remap", "")]
    print("| rows | " + " | ".join(f"{name}{', ' + kernel if kernel else ''}" for name, kernel in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    chosen = {}
    for rows in args.rows:
        x = torch.randn(rows, args.features, device=args.device).bfloat16()
        times: dict[tuple[str, str], list[float]] = {column: [] for column in columns}
        for turn in range(args.rounds + 2):
            for name, kernel in columns:
                module = copies[turn % args.copies][name]
                KERNEL_CALLS.clear()
                with using_kernel(kernel) if kernel else contextlib.nullcontext():
                    taken = seconds(partial(module, x), args.device)
                if not kernel:
                    chosen[rows, name] = "+".join(KERNEL_CALLS)
                if turn >= 2:
                    times[name, kernel].append(taken)
        medians = {column: 1000 * statistics.median(found) for column, found in times.items()}
        dense = medians["dense", ""]
        cells = [f"{medians[column]:.2f} ({dense / medians[column]:.1f}x)" for column in columns]
        print(f"| {rows} | " + " | ".join(cells) + " |")
    kernels = [f"{name} at {rows} rows: {kernel}" for (rows, name), kernel in chosen.items() if kernel]
    print("\nchosen by the table:", ", ".join(kernels))
    if args.device != "cpu":
        rate = copy_rate(args.device)
        print(f"large copy: {rate / 1e9:.0f} GB/s; bandwidth bounds in ms: ", end="")
        print(", ".join(f"{name} {1000 * weight_bytes(module) / rate:.4f}" for name, module in copies[0].items()))


if __name__ == "__main__":
    main()
