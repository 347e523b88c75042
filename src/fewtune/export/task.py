"""`fewtune export`: a task file's model in another program's form, checked before it is put in its place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewtune.errors import ConfigError, Progress
from fewtune.export import int8 as eight
from fewtune.export.checkpoint import Lines, library_of, write_checkpoint
from fewtune.export.graphs import write_onnx, write_program
from fewtune.export.tuned import Run, Tuned, tuned


@dataclass(frozen=True)
class Format:
    """A form that tasks are exported to.

    suffix: of the file; empty where it is a folder.
    write: the tuned model and where to write it -> the written model, loaded again.
    lines: the Python that loads it.
    """

    suffix: str
    write: Callable[[Tuned, Path], Run]
    lines: Callable[[Tuned, Path], Lines]


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked.

    difference: the largest of the logits from the task's own, relative to the largest logit where that is over 1.
    lines: Python that loads it.
    accuracy: before and after quantising, where both were measured.
    """

    out: Path
    size: int
    difference: float
    lines: Lines
    accuracy: dict[str, float] = field(default_factory=dict)


def export_task(
    file: str | Path,
    to: str,
    out: str | Path,
    *,
    int8: bool = False,
    data: str | None = None,
    progress: Progress | None = None,
    **data_options: Any,
) -> Exported:
    """Write a task file's model as `to` says ("checkpoint", "onnx" or "torch-export").

    What was written is loaded again and must give the task's own logits on batches of 1 and 7 images; else nothing
    is put at `out`. An 8-bit file is made from one that was checked so.

    Args:
        int8: of "onnx": 8-bit weights (see `fewtune.export.int8`).
        data: with `int8`: labelled images, for the ranges of activations and the accuracy before and after.
        data_options: of `fewtune.data.load_data`.

    Raises:
        ConfigError: a format or a path that does not fit.
        DeltaError: the file is missing or damaged.
        ExportError: the model cannot be exported, or the exported one predicts something else.
        TuningError: a checkpoint was asked for, and the method's modules cannot be merged.
    """
    out = Path(out)
    form = _format(to, out, int8, data)
    task = tuned(Path(file), progress)
    if task.draws_masks:
        _fits_masks(to, data)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        written = Path(scratch) / f"model{form.suffix}"
        if not form.suffix:
            written.mkdir()
        difference = task.check(form.write(task, written), f"the {to} export")
        accuracy: dict[str, float] = {}
        if int8:
            images = None if data is None else eight.labelled(task, data, progress, **data_options)
            plain, written = written, Path(scratch) / f"int8{form.suffix}"
            eight.quantise(plain, written, None if images is None else images.calibration)
            if images is not None:
                accuracy = {name: eight.accuracy(path, images.test) for name, path in _pair(plain, written)}
                accuracy["images"] = len(images.test)
        size = _put(written, out)
    return Exported(out, size, difference, form.lines(task, out), accuracy)


def _pair(plain: Path, quantised: Path) -> list[tuple[str, Path]]:
    return [("float32", plain), ("int8", quantised)]


def _format(to: str, out: Path, int8: bool, data: str | None) -> Format:
    if to not in FORMATS:
        raise ConfigError(f'no format is called "{to}": take one of {", ".join(FORMATS)}')
    form = FORMATS[to]
    if form.suffix and out.suffix != form.suffix:
        raise ConfigError(f"--to {to} writes one file, and its --out must end in {form.suffix}, got {out}")
    if not form.suffix and out.exists() and not out.is_dir():
        raise ConfigError(f"--to {to} writes a folder, and {out} is a file; give another --out")
    if int8 and to != "onnx":
        raise ConfigError(f"--int8 goes with --to onnx, not with --to {to}")
    if data is not None and not int8:
        raise ConfigError("--data measures what --int8 costs; without --int8 leave it out")
    return form


def _fits_masks(to: str, data: str | None) -> None:
    if to == "checkpoint":
        raise ConfigError(
            "a segmenter is no model of timm or transformers, so it has no checkpoint of theirs: take --to onnx or "
            "torch-export, or `fewtune delta export` for the bare weights"
        )
    if data is not None:
        raise ConfigError("--data measures the accuracy of classes, and this task draws masks; leave --data out")


def _put(written: Path, out: Path) -> int:
    """Move what was written to its place; its size in bytes."""
    if written.is_file():
        os.replace(written, out)
        return out.stat().st_size
    out.mkdir(exist_ok=True)
    for file in sorted(written.iterdir()):
        os.replace(file, out / file.name)
    return sum(file.stat().st_size for file in out.iterdir())


def _onnx_lines(_: Tuned, out: Path) -> Lines:
    return (
        "import onnxruntime",
        f'session = onnxruntime.InferenceSession("{out}")',
        'logits = session.run(["logits"], {"images": images})[0]',
    )


def _program_lines(_: Tuned, out: Path) -> Lines:
    return "import torch", f'model = torch.export.load("{out}").module()', "logits = model(images)"


FORMATS = {
    "checkpoint": Format("", write_checkpoint, lambda task, out: library_of(task).lines(task, out)),
    "onnx": Format(".onnx", write_onnx, _onnx_lines),
    "torch-export": Format(".pt2", write_program, _program_lines),
}
