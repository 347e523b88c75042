"""The Triton kernel against the reference, in a process of its own: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

# (rows, neurons, fan_in, K, of so many hot columns)
CASES = [
    (1, 1, 1, 1, 1),
    (7, 5, 11, 2, 11),
    (131, 67, 40, 1, 9),
    (300, 70, 50, 3, 50),
    (197, 130, 300, 2, 200),
    (64, 64, 20, 20, 20),
    (520, 16, 24, 4, 24),
]

SCRIPT = """
import json, sys
import torch
from fewtune.tuning.ops import SelectedPlaces, linear_selected_gradient, reference, triton

device = "cuda" if torch.cuda.is_available() else "cpu"
calls, kernel = [], triton.selected_gradient
triton.selected_gradient = lambda *a: calls.append(1) or kernel(*a)
errors = []
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for rows, neurons, fan_in, k, hot in json.loads(sys.argv[1]):
        torch.manual_seed(0)
        index = torch.stack([torch.randperm(hot)[:k].sort().values for _ in range(neurons)])
        flat = (torch.arange(neurons)[:, None] * fan_in + index).flatten()
        places = SelectedPlaces.of((neurons, fan_in), flat, device=device)
        x = torch.randn(rows, fan_in, device=device).to(dtype)
        dense = torch.randn(rows, neurons, device=device).to(dtype)
        crooked = dense.t().contiguous().t()
        for dy, kept in ((dense, x[:, places.hot]), (crooked, x), (dense[:1].expand(rows, neurons), x)):
            got = linear_selected_gradient(dy, kept, places)
            want = reference.linear_selected_gradient(dy.double(), x.double(), places)
            assert got.dtype == torch.float32
            errors.append((str(dtype), ((got - want).abs().max() / want.abs().max()).item()))
        assert torch.equal(got, linear_selected_gradient(dy, kept, places))
print(json.dumps({"errors": errors, "calls": len(calls)}))
"""


def test_kernel_matches_reference() -> None:
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # Every call but those over more columns than the kernel takes (exact float32: two cases).
    assert result["calls"] >= 3 * 4 * (len(CASES) - 2)
    tolerance = {"torch.float32": 1e-5, "torch.float16": 1e-2, "torch.bfloat16": 1e-2}
    assert [e for e in result["errors"] if e[1] > tolerance[e[0]]] == []


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fewtune.tuning.ops.triton_kernel import selected_gradient_kernel as kernel

pointers = {"column_ptr": "*i64", "partial_ptr": "*fp32"}
fixed = {"dy_stride_o": 1, "x_stride_w": 1, "BLOCK_N": 64, "BLOCK_O": 64, "BLOCK_W": 64, "UPCAST": False}
for capability in (80, 90):
    for dtype, precision in (("fp32", "tf32"), ("bf16", "ieee"), ("fp16", "ieee")):
        constants = {**fixed, "PRECISION": precision}
        types = {**pointers, "dy_ptr": "*" + dtype, "x_ptr": "*" + dtype}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = compile(ASTSource(kernel, signature, at), target=GPUTarget("cuda", capability, 32))
        assert "mma" in compiled.asm["ptx"], "tensor cores are not used"
"""


def test_kernel_compiles_for_gpus_onto_tensor_cores() -> None:
    # The interpreter takes Python that the compiler refuses, and no GPU is needed to compile.
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


def test_the_package_imports_without_triton() -> None:
    script = "import sys; sys.modules['triton'] = None; import fewtune.tuning.ops as o; print(o.linear_keep)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
