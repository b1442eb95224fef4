"""The device that a person names: whether this machine has it."""

from __future__ import annotations

import torch


def require_device(name: str | torch.device) -> None:
    """Raise ValueError if `name` is no device of PyTorch's, or one that this machine does not have."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        there = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        raise ValueError(
            f"device={str(name)!r} cannot be used: {reason}; this machine has: {', '.join(['cpu', *there])}"
        ) from error
