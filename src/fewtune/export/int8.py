"""An ONNX file with 8-bit weights, by onnxruntime's quantiser.

Without data only the matrices are quantised, and activations as they come (dynamic). With data the ranges of all
activations are measured on training images (static), and convolutions are quantised too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewtune.data import ImageData, Split, load_data
from fewtune.errors import DataError, Progress
from fewtune.export.graphs import open_onnx
from fewtune.export.tuned import Tuned
from fewtune.progress import shown
from fewtune.training.loaders import image_loader
from fewtune.training.seen import chosen

CALIBRATION = 128
"""At most so many training images measure the activations."""


@dataclass(frozen=True)
class Labelled:
    """Images of the task's classes: `calibration` the task was trained on where that is known, `test` it was not."""

    calibration: Split
    test: Split


def labelled(tuned: Tuned, data: str, progress: Progress | None = None, **options: Any) -> Labelled:
    """Images for quantising and for its measure; the test images serve for both where none were trained on.

    Args:
        data: as in `fewtune.data.load_data`, with its options; split again as it was for training.

    Raises:
        DataError: the data cannot be read, has classes that the task does not know, or only images it was trained on.
    """

    def load(spec: str, **given: Any) -> ImageData:
        return load_data(spec, progress=progress, **given)

    def first(images: Split, limit: int) -> Split:
        return images.subset(range(limit))

    parts = chosen(load, data, "test", tuned.task.delta.metadata, first, include_training=True, progress=progress,
                   **options)  # fmt: skip
    if parts.fresh is None:
        raise DataError(f"the task was trained on all images of {data}: give others, or fit with test_fraction=0.2")
    names = load(data, val_fraction=0.0).class_names
    train = parts.fresh if parts.trained is None else parts.trained
    step = max(1, len(train) // CALIBRATION)
    calibration = train.subset(range(0, len(train), step)[:CALIBRATION])
    return Labelled(_ready(tuned, names, calibration), _ready(tuned, names, parts.fresh))


def _ready(tuned: Tuned, class_names: Sequence[str], split: Split) -> Split:
    """The split with the task's class numbers and its transform."""
    known = tuned.class_names
    if unknown := [name for name in class_names if name not in known]:
        raise DataError(f"the data has classes that the task does not know: {', '.join(unknown[:5])}")
    labels = [known.index(class_names[label]) for label in split.labels if isinstance(label, int)]
    if len(labels) < len(split):
        raise DataError("the data gives an image several classes; accuracy is of images of one class each")
    return replace(split, labels=labels).with_transform(tuned.transform)


def accuracy(file: Path, split: Split) -> float:
    """The share of images that an ONNX file classifies rightly."""
    run = open_onnx(file)
    hits = 0
    loader = image_loader(split, 32)
    for images, labels, _ in shown(loader, f"accuracy of {file.stem}", len(loader)):
        hits += int((run(images).argmax(dim=1) == labels).sum())
    return hits / len(split)


def quantise(source: Path, out: Path, calibration: Split | None) -> None:
    """Write `source` (ONNX, float32) with 8-bit weights to `out`; metadata stays.

    Without `calibration` MatMul and Gemm are quantised dynamically, with it Conv, MatMul and Gemm statically.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = out.with_suffix(".ready.onnx")
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    options = {"MatMulConstBOnly": True}
    if calibration is None:
        quantize_dynamic(ready, out, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                         weight_type=QuantType.QInt8, extra_options=options)  # fmt: skip
    else:
        quantize_static(ready, out, Batches(calibration), op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                        per_channel=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
                        extra_options=options)  # fmt: skip
    ready.unlink()
    _keep_metadata(source, out)


def _keep_metadata(source: Path, out: Path) -> None:
    import onnx

    props = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    made = onnx.load(out)
    onnx.helper.set_model_props(made, {**props, "quantised": "int8"})
    onnx.save(made, out)


class Batches:
    """Calibration images, one batch a call, as onnxruntime's quantiser reads them."""

    def __init__(self, split: Split) -> None:
        self.batches: Iterator[Sequence[torch.Tensor]] = iter(image_loader(split, 16))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch[0].numpy()}
