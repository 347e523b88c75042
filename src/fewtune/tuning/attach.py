"""Attach a selection to a model, so that only what it names is trained (Eq. 5-6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fewtune.errors import TuningError, nearest
from fewtune.neurons import has_running_statistics, owners, require_float, require_tunable
from fewtune.quantised import Overlaid, logical_shape
from fewtune.selection import Selection
from fewtune.sharded import is_sharded, is_unit
from fewtune.tuning import layers, stepping, trained
from fewtune.tuning.frozen_sample import Sample
from fewtune.tuning.layers import Tuned
from fewtune.tuning.parts import Parts
from fewtune.tuning.tuner import Tuner, persistent_buffers

stepping.follow_optimizers()


def attach(
    model: nn.Module,
    selection: Selection,
    *,
    running_statistics: Literal["frozen", "update"] = "frozen",
    column_rms: Mapping[str, Tensor] | None = None,
) -> Tuner:
    """Freezes a model but for what a selection names, which is trained through compact values.

    The model stays the same object, and its layers instances of their classes. Order: create the model, convert
    (SyncBatchNorm), move and cast it, attach, then wrap it (DDP, FSDP2), compile it, make the optimiser. Values are
    written into the weights after every step of a ``torch.optim`` optimiser; after any other change of them call
    `Tuner.sync` (a forward pass that is not compiled does so itself where it can tell that they changed).

    A weight that torchao (int8) or bitsandbytes (4 bits) has quantised stays so, and the selected connections are
    trained in float beside it; the layer computes with the dense weight, made for one operation at a time.

    Args:
        model: the model that the selection was made for.
        selection: of `fewtune.select`.
        running_statistics: "frozen": batch normalisation uses the pretrained statistics even in training mode;
            "update": training mode updates them, and the delta carries them.
        column_rms: of `fewtune.tuning.column_rms`: selected connections are then trained in units of their input.

    Raises:
        TuningError: the model is attached already, the selection was made for another model, inference mode is on,
            ``column_rms`` lacks a weight, a weight is quantised in a way that is not known, or what is trained whole
            (the head) is quantised.
    """
    if running_statistics not in ("frozen", "update"):
        raise TuningError(f"running_statistics={running_statistics!r}; expected 'frozen' or 'update'")
    _check(model, selection)
    if column_rms is not None and (lacking := selection.places.keys() - column_rms.keys()):
        raise TuningError(f"column_rms has no {min(lacking)!r}; it must have every weight that the selection names")
    views = selection.anatomy.views
    overlaid = Overlaid.of(model, {n: views[n].stored_index(places.flat) for n, places in selection.places.items()})
    overlaid.put_in()
    held = owners(model)
    flags = {name: owner[0].module._parameters[owner[0].attribute].requires_grad for name, owner in held.items()}  # type: ignore[union-attr]
    buffers = {name: buffer.detach().clone() for name, buffer in persistent_buffers(model).items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sample = Sample.of(selection, dict(model.named_parameters()))
    tuned = {
        name: trained.tune_selected(selection, name, tuple(held[name]), (column_rms or {}).get(name))
        for name in selection.places
    }
    for name in (*selection.whole, *selection.head):
        tuned[name] = trained.tune_whole(tuple(held[name]))
    statistics = {}
    if running_statistics == "frozen":
        in_head = {name.rpartition(".")[0] for name in selection.head}
        for name, module in model.named_modules():
            if has_running_statistics(module) and name not in in_head:
                layers.freeze_statistics(module)
                statistics[name] = module
    parts = Parts({name: owner[0] for name, owner in held.items()}, statistics)
    return Tuner(model, selection, tuned, flags, buffers, sample, parts, overlaid)


def _check(model: nn.Module, selection: Selection) -> None:
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise TuningError(
            "attach was called within torch.inference_mode(), or the model was made there, so that nothing could be "
            "trained: make the model and attach outside of it"
        )
    if any(isinstance(module, Tuned) for module in model.modules()):
        raise TuningError("a selection is attached to this model already; detach it first")
    if any(is_unit(m) for m in model.modules()) or any(is_sharded(p) for p in model.parameters()):
        raise TuningError("the model's parameters are distributed already; attach first, then shard (fully_shard)")
    shapes = {name: logical_shape(p) for name, p in model.named_parameters()}
    for name, shape in selection.anatomy.shapes.items():
        if name not in shapes:
            raise TuningError(
                f"the selection is of another model: this one has no parameter {name!r}{nearest(name, shapes)}"
            )
        if shapes[name] != shape:
            raise TuningError(f"the selection is of another model: {name} has shape {shapes[name]}, expected {shape}")
    named = dict(model.named_parameters())
    require_tunable({name: named[name] for name in selection.places}, TuningError)
    require_float({name: named[name] for name in (*selection.whole, *selection.head)}, TuningError)
