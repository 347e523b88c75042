"""A task as a small file: `Delta` is taken from a tuned model, saved, loaded, applied, reverted and swapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from fewtune.delta.apply import (
    Verify,
    alone_with,
    applied_contents,
    apply_delta,
    forget,
    revert_delta,
    swap_delta,
)
from fewtune.delta.contents import Contents
from fewtune.delta.format import contents, read_file, to_bytes, write_file
from fewtune.hub import resolve


class Delta(Contents):
    """A task: new values of the selected connections, new tensors for what was trained whole. Not to be changed.

    Made by `take` (or ``tuner.delta()``) and `load_delta`.

    Attributes:
        choice: what was tuned.
        values: weight name -> new values, 1-D, in the order of the selection's places.
        whole: parameter name -> new tensor, for biases, scales and head.
        buffers: buffer name -> new tensor, where running statistics were trained.
        fingerprint: of the backbone.
        metadata: what its maker noted: JSON values by name.
        quantised: weight name -> how it was quantised (`fewtune.quantised.scheme`), where the backbone was; the
            fingerprint is then of the numbers that the quantised weights stand for.
    """

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the delta as one safetensors file, whole or not at all.

        Args:
            path: the file; its folder must exist.
            dtype: ``torch.float16`` or ``torch.bfloat16`` rounds all numbers to half the bytes; None loses nothing.

        Raises:
            DeltaError: another dtype, values beyond its range, metadata that is no JSON, or the file cannot be written.
        """
        write_file(Path(path), to_bytes(self, dtype))

    def apply(self, model: nn.Module, verify: Verify = "fast", on: Delta | None = None) -> None:
        """Writes the task into a model of the same backbone and keeps in memory what it overwrites.

        All checks come before the first write. Values are cast to the model's dtype; `revert` is exact in it.

        A task that was tuned on quantised weights belongs to a backbone that is quantised the same way, where the
        values lie over the quantised weights, which are not changed. In full precision the same backbone is recognised
        by quantising its weights anew, and a warning says by how much they differ from those that were tuned on.

        Args:
            model: the backbone, in any floating dtype, on any device. Where its head has another number of classes
                than the task, the parameters of the head's linear layers or convolutions are replaced by ones of the
                task's size, and what says that number with them (``out_features``, ``num_classes``, the
                configuration's labels); `revert` puts the model's own back.
            verify: "fast" looks at every place to be overwritten and a sample of the rest (milliseconds), "full" at
                all of the backbone, "none" only at names and shapes.
            on: a delta that is applied to the model and on which this one was made (`fewtune.delta.levels`); both are
                reverted, this one first.

        Raises:
            DeltaError: another backbone, or one quantised in another way, a head that differs in more than its number
                of classes, a delta is applied already, or a selection is attached. The model is unchanged.
        """
        apply_delta(model, self, verify, on)

    def revert(self, model: nn.Module) -> None:
        """Writes back, bit for bit, what `apply` overwrote in this process.

        Raises:
            DeltaError: this delta is not applied to the model, or the model's weights were changed since. (Then what
                was kept is of no use any more and is forgotten: load the backbone's weights again.)
        """
        revert_delta(model, self)

    def swap(self, model: nn.Module, new: Delta, verify: Verify = "fast") -> None:
        """Replaces this delta, applied to the model, by another one of the same backbone.

        Raises:
            DeltaError: as `revert` and `apply`; where the new one cannot be applied, this one stays.
        """
        swap_delta(model, self, new, verify)

    @contextmanager
    def applied_to(self, model: nn.Module, verify: Verify = "fast") -> Iterator[nn.Module]:
        """A context in which the delta is applied; it is reverted at the end, after an exception too."""
        self.apply(model, verify)
        try:
            yield model
        finally:
            self.revert(model)

    def merge(self, model: nn.Module, verify: Verify = "fast") -> None:
        """Writes the task into a model for good: `apply`, but nothing is kept and the model is plain afterwards."""
        with alone_with(model):
            self.apply(model, verify)
            forget(model)


def load_delta(path: str | Path, *, limit: int | None = None) -> Delta:
    """Reads a delta that `Delta.save` wrote.

    Args:
        path: the file, or its address: ``hf://org/name[@revision][/file]`` of the Hugging Face hub, or ``s3://…`` and
            what else fsspec opens.
        limit: the most bytes that its numbers may take in memory. Left out, 32 times the size of the file (16 MiB for
            a small one), so that a small file of a stranger cannot fill the memory.

    Raises:
        DeltaError: the file is missing, of another kind, of a newer version, truncated or altered, or the hub does
            not give it.
    """
    fetched = resolve(path)
    return from_bytes(read_file(fetched.path), str(fetched), limit)


def from_bytes(content: bytes, source: str = "the delta", limit: int | None = None) -> Delta:
    """A delta from the bytes of a file, as `load_delta` reads it; ``source`` begins the error messages."""
    read = contents(content, source, limit)
    return Delta(**{field.name: getattr(read, field.name) for field in fields(read)})


def applied(model: nn.Module) -> Delta | None:
    """The delta that is applied to a model in this process, or None."""
    present = applied_contents(model)
    assert present is None or isinstance(present, Delta)
    return present


def swap(model: nn.Module, new: Delta, verify: Verify = "fast") -> None:
    """Replaces the delta that is applied to the model, or applies ``new`` where none is; see `Delta.swap`."""
    with alone_with(model):
        present = applied(model)
        if present is None:
            new.apply(model, verify)
        else:
            present.swap(model, new, verify)
