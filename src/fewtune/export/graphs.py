"""The tuned model as a graph that runs without fewtune: an ONNX file, or a program of torch.export.

Both take images [batch, 3, S, S] of any batch size, preprocessed as their metadata says, and give logits
[batch, classes].
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewtune.errors import ExportError, MissingExtra, one_line
from fewtune.export.tuned import Logits, Run, Tuned

LARGEST_ONNX = 2**31 - 2**20
"""Bytes of weights that one ONNX file can hold: a protobuf message is smaller than 2 GiB."""


def program(tuned: Tuned) -> torch.export.ExportedProgram:
    """The tuned model as torch.export captures it, the batch size left open.

    Raises ExportError where it cannot be captured.
    """
    batch = {"images": {0: torch.export.Dim("batch")}}
    model = Logits(tuned.model).eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, (tuned.images(2),), dynamic_shapes=batch, strict=False)
    except Exception as error:  # its errors share no base class
        raise ExportError(
            f"torch.export cannot capture this model with a free batch size: {one_line(error, 300)}"
        ) from error


def write_program(tuned: Tuned, file: Path) -> Run:
    """Write a .pt2 file and load it again. Its extra file "fewtune.json" holds the metadata."""
    made = {"fewtune.json": json.dumps(tuned.inputs(), indent=2, ensure_ascii=False)}
    torch.export.save(program(tuned), file, extra_files=made)
    return torch.export.load(file).module()


def write_onnx(tuned: Tuned, file: Path) -> Run:
    """Write an .onnx file, with the metadata in its metadata_props, and open it in onnxruntime.

    Raises:
        MissingExtra: the libraries of fewtune[onnx] are not installed.
        ExportError: the model cannot be captured, or is too large for one file.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        _require(library)
    weights = sum(tensor.nbytes for tensor in tuned.model.state_dict().values())
    if weights > LARGEST_ONNX:
        raise ExportError(
            f"the model has {weights / 1e9:.1f} GB of weights and one ONNX file holds 2 GB; use --to torch-export"
        )
    made = torch.onnx.export(
        program(tuned), (), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
    )
    assert made is not None
    made.model.metadata_props.update(tuned.metadata())
    made.save(file, external_data=False)
    return open_onnx(file)


def open_onnx(file: Path) -> Run:
    """An ONNX file as a function from images to logits, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        logits = session.run(["logits"], {"images": np.ascontiguousarray(images.numpy())})[0]
        return torch.from_numpy(np.asarray(logits))

    return run


def _require(library: str) -> None:
    import importlib.util

    if importlib.util.find_spec(library) is None:
        raise MissingExtra(library, "onnx")
