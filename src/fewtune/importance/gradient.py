"""Scores by gradients (Eq. 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.errors import ImportanceError
from fewtune.importance.passes import Progress, accumulate, left_as_found, reduce_over_processes
from fewtune.importance.prepared import backward_of, check_count, scoring_of
from fewtune.importance.scores import Scores
from fewtune.importance.settling import Settling
from fewtune.neurons import ASK_MODEL, HeadSpec, Role
from fewtune.objectives import Objective, SupCon
from fewtune.quantised import seen_dequantised


@seen_dequantised
def gradient_importance(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective | None = None,
    head: HeadSpec = ASK_MODEL,
    *,
    roles: Mapping[str, str | Role] | None = None,
    exclude: Iterable[str] = (),
    train_mode: bool = False,
    limit: int | None = None,
    settle: float | None = None,
    passes: int = 1,
    store: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Scores:
    r"""The modulus of the summed gradient of every connection (Eq. 1).

    .. math:: s_{ij} = \Big| \sum_b \partial L_b / \partial w_{ij} \Big|

    Signed gradients are summed over the batches in float32 (float64 for float64 weights) and the modulus is taken
    once, at the end. Each gradient is freed as soon as it is added, so that one layer's gradient is alive at a time. Of
    two views only one is kept for the backward pass at a time, in evaluation mode and with the model's own features.
    The model is left as it was found: mode, flags, gradients, buffers and random state.

    A model that FSDP has sharded (``fully_shard``, of one mesh dimension) is scored as it lies, one unit's weights and
    gradients whole at a time: each process gives its own batches, as many as every other, keeps its rows of the sums,
    and gets the scores whole, in main memory.

    Args:
        model: on its device; batches are moved there.
        loader: yields ``(images, labels)`` or ``((view1, view2), labels)``.
        objective: (model, inputs, labels) -> scalar; `SupCon` where left out.
        head: see `fewtune.neurons.describe`.
        roles: roles set by hand, see `fewtune.neurons.describe`.
        exclude: glob patterns of modules that get no scores, as `select` takes them: their gradients are not formed,
            and the backward pass ends where no scored weight is left.
        train_mode: run in training mode (dropout, batch statistics) instead of evaluation mode.
        limit: use this many batches at most.
        settle: end the pass when this share of the neurons has the same largest connection as after half as many
            batches (see `fewtune.importance.settling`); in (0, 1]. Left out, all batches are used.
        passes: read the data this many times, each time for a part of the layers: the gradients of the other parts
            are not formed, for a model that hardly fits. The loader must yield the same batches each time.
        store: device of the sums, such as "cpu" for a model that hardly fits; the weight's own where left out.
        progress: called as (batches done, batches in all or None).

    Raises:
        ImportanceError: NaN or all-zero scores, an empty loader, or one that yields something else; a limit or a number
            of passes below 1, or an impossible ``settle``.
        SelectionError: a pattern of ``exclude`` matches no module, or nothing is left.
        ModelError: ``head`` names no module.
    """
    check_count("limit", limit)
    check_count("passes", passes)
    if settle is not None and not 0 < settle <= 1:
        raise ImportanceError(f"settle={settle!r}; expected a share of the neurons above 0, at most 1")
    anatomy, weights = scoring_of(model, head, roles, exclude)
    backward, names, sums = backward_of(objective, head, train_mode), list(weights), dict[str, Tensor]()
    with left_as_found(model, train_mode):
        for part in range(min(passes, len(names))):
            chosen = {name: weights[name] for name in names[part::passes]}
            settled = None if settle is None else Settling(anatomy.views, settle)
            sums |= accumulate(
                model,
                loader,
                objective or SupCon(),
                chosen,
                backward=backward,
                limit=limit,
                settled=settled,
                store=store,
                progress=progress,
            )
    reduce_over_processes(sums, weights)
    return Scores({name: sums[name].abs_() for name in names}, anatomy)
