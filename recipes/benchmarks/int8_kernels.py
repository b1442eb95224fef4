"""Speed of products with dense, low-rank and 8-bit weights, all in one run: the table in `encodings/README.md`.

    python recipes/benchmarks/int8_kernels.py [--device cuda] [--features 4096] [--rank 1024]
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python recipes/benchmarks/int8_kernels.py   # as an older CPU

Random weights; rounds of all formats by turns, medians of milliseconds. Every round takes the next of several copies
of the weights, so that they come from memory and not from the cache. A format is a structure and an encoding:

* dense: an `nn.Linear` in bfloat16; low rank: two of them; int8, remap: the linears of either in 8 bits
* columns with the name of a kernel are forced to it; the others take what the table of kernels chooses by itself

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
from optimum_dobisvd.structures.format import format_named

# Name in the table -> structure and encoding.
FORMATS = {
    "dense": ("dense", "float"),
    "low rank": ("low_rank", "float"),
    "dense int8": ("dense", "int8"),
    "low rank int8": ("low_rank", "int8"),
    "low rank remap": ("low_rank", "remap"),
}


def modules(features: int, rank: int, device: str) -> dict[str, nn.Module]:
    """Return one module of every format, weights random."""
    plain = nn.Linear(features, features, bias=False, device="meta", dtype=torch.bfloat16)
    made: dict[str, nn.Module] = {}
    for name, (structure, encoding) in FORMATS.items():
        format = format_named(structure, encoding)
        own_rank = rank if format.structure.has_rank else None
        new = format.empty(plain, own_rank).to_empty(device=device)
        made[name] = new.linear if format.leaves_as_is else new
        for tensor in made[name].parameters():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
            else:
                info = torch.iinfo(tensor.dtype)
                tensor.random_(info.min + 1, info.max)
    return made


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes that one product must read of the module."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def seconds(call: Callable[[], object], device: str) -> float:
    """Return the seconds of one call, on the device's own clock where it has one."""
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
    """Return the bytes per second of a large copy, read and written."""
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
    copies = [modules(args.features, args.rank, args.device) for _ in range(args.copies)]
    device = torch.cuda.get_device_name() if args.device != "cpu" else torch.backends.cpu.get_cpu_capability()
    print(f"{args.features} x {args.features}, rank {args.rank}, bfloat16, {device}, {platform.machine()}, ", end="")
    print(f"{torch.get_num_threads()} threads, medians of {args.rounds} rounds in ms (and times dense)\n")
    mine = [kernel.name for kernel in KERNELS if kernel.name != ("cpu_int8" if args.device != "cpu" else "triton")]
    columns = [("dense", ""), ("low rank", "")]
    columns += [(name, kernel) for name in ("dense int8", "low rank int8") for kernel in ("", *mine)] + [
        ("low rank remap", "")
    ]
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
