"""Seconds per stage and peak memory of a run."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import psutil
import torch


class Stages:
    """Collects `name -> seconds` and `name -> bytes of memory above the start` for the stages of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and watch its memory (resident set on the host plus, with CUDA, allocated on the GPU)."""
        process = psutil.Process()
        before = process.memory_info().rss
        peak = before
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, process.memory_info().rss)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        cuda = torch.cuda.is_available()
        cuda_before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)
            done.set()
            thread.join()
            peak = max(peak, process.memory_info().rss)
            on_gpu = torch.cuda.max_memory_allocated() - cuda_before if cuda else 0
            self.peak_bytes[name] = peak - before + on_gpu
