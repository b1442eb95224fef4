"""The gradient through a singular value decomposition, torch's and `stable_svd`'s, as a picture.

python recipes/benchmarks/svd_gradients.py --picture svd_gradients.png
"""

import argparse
from pathlib import Path

import torch

from optimum_dobisvd import stable_svd
from optimum_dobisvd.report.figure import new_figure, save_figure


def draw(path: Path) -> Path:
    """The gradient through a singular value decomposition as two of the values draw together: torch's and ours.

    A 6 x 6 matrix with singular values 1 and `1 - gap` in the middle of its spectrum, truncated between the two; the
    norm of the gradient against the gap, in float32.

    Raises:
        ImportError: matplotlib is missing.
    """
    gaps = [10 ** (-exponent / 4) for exponent in range(37)]
    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    for name, found, style in (
        ("torch.linalg.svd", [svd_gradient_norm(gap, stable=False) for gap in gaps], "-"),
        ("stable_svd", [svd_gradient_norm(gap, stable=True) for gap in gaps], "--"),
    ):
        axes.plot(gaps, found, style, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("relative distance of two singular values")
    axes.set_ylabel("norm of the gradient (gaps in the line: NaN or infinite)")
    axes.legend(frameon=False)
    axes.set_title("the gradient of a truncation between two values that draw together", loc="left", fontsize=10)
    return save_figure(figure, path)


def svd_gradient_norm(gap: float, *, stable: bool) -> float:
    """Norm of the gradient of one soft truncation through either decomposition; NaN where it is not finite."""
    generator = torch.Generator().manual_seed(0)
    left, right, weights = (torch.randn(6, 6, generator=generator) for _ in range(3))
    left, right = torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]
    values = torch.tensor([4.0, 2.0, 1.0, 1.0 - gap, 0.5, 0.25])
    matrix = (left * values @ right.T).requires_grad_(True)
    with torch.enable_grad():
        if stable:
            u, s, v = stable_svd(matrix)
        else:
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
            v = vt.T
        gates = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
        (((u * (s * gates)) @ v.T) * weights).sum().backward()
    found = matrix.grad
    return float(found.norm()) if found is not None and bool(torch.isfinite(found).all()) else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, required=True)
    print(draw(parser.parse_args().picture))


if __name__ == "__main__":
    main()
