"""Memory of one training step, method by method, each in a fresh process.

    python benchmarks/speed/memory.py                                          # ViT-S/16 and ConvNeXt-T, batch 8
    python benchmarks/speed/memory.py --models vit_base_patch16_224 --methods full bias-only "GPS K=1" "GPS K=10"
    python benchmarks/speed/memory.py --models tf_efficientnet_lite0 --size 128 --batch 16 --methods full "scoring pass"

Counted in bytes: what the forward pass saves for backward (unique storages, parameters and buffers excluded),
gradients, the optimiser's state, what the tuner itself holds beside the model (indices, masks, original values), and
the peak of the process's memory during the step beyond what it held before (on CUDA: the peak of allocated memory).
"scoring pass" is a batch of GPS's scoring pass, two views of every image, of which the peak is measured.
Results are added to docs/benchmarks/speed/memory.json.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import fewtune
from fewtune.quantised import Overlay
from methods import CLASSES, PEERS, build
from results import add_result

GPS = ("GPS K=1", "GPS K=2", "GPS K=5", "GPS K=10", "GPS K=20")


class SavedBytes:
    """Within, counts what autograd saves: bytes of the unique storages that are neither parameters nor buffers."""

    def __init__(self, model: nn.Module) -> None:
        own = [t for t in (*model.parameters(), *model.buffers()) if not isinstance(t, Overlay)]
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._storages: dict[int, Any] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, Overlay):  # refers to what a parameter holds
            return tensor
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in self._excluded:
                self._storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def nbytes(tensors: Any) -> int:
    """Bytes of some tensors' storages, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure_scoring(architecture: str, batch: int, device: str, size: int) -> dict[str, int]:
    """What scoring a batch in two views needs, in this process."""
    model = timm.create_model(architecture, pretrained=False, num_classes=CLASSES).to(device)
    views = tuple(torch.randn(2, batch, 3, size, size, device=device))
    labels = torch.arange(batch, device=device) % (batch // 2)
    small = tuple(view[:2] for view in views)
    fewtune.gradient_importance(model, [(small, labels[:2])])  # libraries set up their own memory on the first call
    before = _reset_peak(device)
    fewtune.gradient_importance(model, [(views, labels)])
    return {"peak": _peak(device) - before}


def measure(method: str, architecture: str, batch: int, device: str, size: int, random_columns: bool) -> dict[str, int]:
    """The figures of one method, in this process."""
    if method == "scoring pass":
        return measure_scoring(architecture, batch, device, size)
    candidate = build(method, architecture, random_columns=random_columns, device=device)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    candidate.forward(images[:1], labels[:1]).backward()  # libraries set up their own memory on the first call
    candidate.optimizer.zero_grad(set_to_none=True)
    before = _reset_peak(device)
    with SavedBytes(candidate.model) as saved:
        loss = candidate.forward(images, labels)
    saved_bytes = saved.total
    del saved
    loss.backward()
    candidate.step()
    peak = _peak(device) - before
    state = [value for values in candidate.optimizer.state.values() for value in values.values()]
    return {
        "trained": sum(parameter.numel() for parameter in candidate.trained),
        "saved": saved_bytes,
        "gradients": nbytes(parameter.grad for parameter in candidate.trained if parameter.grad is not None),
        "optimizer": nbytes(tensor for tensor in state if isinstance(tensor, Tensor) and tensor.numel() > 1),
        "held beside": nbytes(candidate.held),
        "peak": peak,
    }


def measured(command: list[str]) -> dict[str, int]:
    """What such a process prints last."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _reset_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc alone keeps freed memory and can be asked for it
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "convnext_tiny"])
    parser.add_argument("--methods", nargs="+", default=[*PEERS, *GPS])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--library", choices=["torch", "onednn"], default="torch", help="for matrices, of all methods")
    parser.add_argument("--random-columns", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print, but record nothing")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = (arguments.batch, arguments.device, arguments.size, arguments.random_columns)
    if arguments.here:
        with fewtune.matrix_library(arguments.library):
            print(json.dumps(measure(arguments.methods[0], arguments.models[0], *options)))
        return
    for architecture in arguments.models:
        figures = {}
        for method in arguments.methods:
            command = [sys.executable, __file__, "--here", "--models", architecture, "--methods", method]
            command += ["--batch", str(arguments.batch), "--device", arguments.device, "--size", str(arguments.size)]
            command += ["--library", arguments.library]
            command += ["--random-columns"] if arguments.random_columns else []
            figures[method] = measured(command)
            print(
                f"{architecture}  {method:14s}", "  ".join(f"{k} {v / 2**20:.1f}" for k, v in figures[method].items())
            )
        if not arguments.dry:
            columns = "uniformly random" if arguments.random_columns else "as measured"
            settings = {"model": architecture, "batch": arguments.batch, "columns": columns}
            settings |= {} if arguments.size == 224 else {"size": arguments.size}
            settings |= {"library": arguments.library} if arguments.library != "torch" else {}
            add_result("memory", arguments.device, torch.get_num_threads(), settings, figures)


if __name__ == "__main__":
    main()
