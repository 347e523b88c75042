"""Measures the constants of src/fewtune/tuning/ops/cost.py on this machine and prints them beside those in use.

    python benchmarks/speed/ops_cost_model.py [--threads 2]

Each constant is the median, over a few shapes of ViT-S/16, ConvNeXt-T and ResNet-50 at batch 8, of a function's time by
the elements that it is counted in. Only ratios between constants matter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from fewtune.tuning.ops import cost
from fewtune.tuning.ops.patches import Unfolded, laid_out
from fewtune.tuning.ops.torch_linear import columns, gathered_sum
from methods import threads

LINEAR = [(1576, 384, 1152), (1576, 384, 384), (1576, 384, 1536), (1576, 1536, 384), (392, 2048, 512)]
# images, in channels, neurons, kernel, stride, padding, size
CONV = [(8, 64, 64, 3, 1, 1, 56), (8, 128, 128, 3, 2, 1, 56), (8, 256, 256, 3, 1, 1, 14), (8, 96, 192, 2, 2, 0, 56)]
DEPTHWISE = [(8, 96, 56), (8, 192, 28), (8, 384, 14)]


def nanoseconds(function: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        function()
        times.append(time.perf_counter_ns() - start)
    return median(times)


def linear_constants() -> Iterator[tuple[str, float]]:
    """(name, nanoseconds an element) of the ways of a linear layer."""
    widths, products = [], []
    terms, rare = [], []  # of one call, of each connection and of each element of dY that is passed by
    for n, fan_in, neurons in LINEAR:
        x, dy = torch.randn(n, fan_in), torch.randn(n, neurons)
        for width in (16, 32, 96, 256):
            kept = x[:, :width].contiguous()
            widths.append(width)
            products.append(nanoseconds(lambda kept=kept, dy=dy: kept.t() @ dy) / (n * neurons))
        chosen = torch.randint(fan_in, (neurons,))
        rows = torch.randint(neurons, (neurons,)).sort().values
        for name, at in (("GATHER", None), ("GATHER_RAGGED", rows)):
            each = nanoseconds(lambda x=x, dy=dy, c=chosen, r=at: gathered_sum(dy, x, c, torch.float32, r))
            yield name, each / (n * len(chosen))
        for share in (32, 12, 4, 2):
            few, at = chosen[: neurons // share], rows[::share][: neurons // share]
            rare.append(nanoseconds(lambda x=x, dy=dy, c=few, r=at: gathered_sum(dy, x, c, torch.float32, r)))
            terms.append([1.0, n * len(few), n * neurons])
        yield "COLUMN", nanoseconds(lambda x=x, c=chosen[:128]: columns(x, c)) / (n * 128)
    slope, fixed = np.polyfit(widths, products, 1)
    yield "PRODUCT_FIXED", float(fixed)
    yield "PRODUCT", float(slope)
    fitted, *_ = np.linalg.lstsq(np.array(terms), np.array(rare), rcond=None)
    for name, value in zip(("RARE_CALL", "GATHER_RARE", "RARE_SWEEP"), fitted, strict=True):
        yield name, float(value)


def conv_constants() -> Iterator[tuple[str, float]]:
    """The same of a convolution."""
    for images, channels, neurons, kernel, stride, padding, size in CONV:
        yield from _conv(images, channels, neurons, kernel, stride, padding, size, 1)
    for images, channels, size in DEPTHWISE:
        yield from _conv(images, channels, channels, 7, 1, 3, size, channels)


def _conv(
    images: int, channels: int, neurons: int, kernel: int, stride: int, padding: int, size: int, groups: int
) -> Iterator[tuple[str, float]]:
    for last, layout in ((False, "PLANES"), (True, "PIXELS")):
        x = laid_out(torch.randn(images, channels, size, size), last)
        weight = laid_out(torch.randn(neurons, channels // groups, kernel, kernel), last)
        dy = torch.randn_like(F.conv2d(x, weight, None, stride, padding, 1, groups))
        numbers = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, [False, True, False])
        library = nanoseconds(
            lambda x=x, dy=dy, w=weight, n=numbers: torch.ops.aten.convolution_backward(dy, x, w, None, *n)
        )
        yield ("LIBRARY" if groups == 1 else f"LIBRARY_GROUPED_{layout}"), library / (dy.numel() * weight[0].numel())
        channel, tap = torch.randint(channels, (neurons,)), torch.randint(kernel**2, (neurons,))
        if groups > 1:
            channel = torch.arange(channels)

        def gathered(x: torch.Tensor = x, dy: torch.Tensor = dy, c: torch.Tensor = channel) -> torch.Tensor:
            unfolded = Unfolded.of(x, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1))
            return (unfolded.columns(unfolded.offsets(c, tap)) * dy).sum((0, 2, 3))  # noqa: B023

        yield f"GATHER_{layout}", nanoseconds(gathered) / dy.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    measured: dict[str, list[float]] = {}
    with threads(parser.parse_args().threads):
        for constants in (linear_constants(), conv_constants()):
            for name, value in constants:
                measured.setdefault(name, []).append(value)
    print(f"{'constant':24s} measured  in use")
    for name, values in measured.items():
        print(f"{name:24s} {median(values):8.4f}  {getattr(cost, name):6.4f}")


if __name__ == "__main__":
    main()
