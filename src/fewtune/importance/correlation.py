"""Scores by the correlation of a connection's input with its neuron's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.importance.columns import ColumnSums
from fewtune.importance.passes import Progress, accumulate, left_as_found, reduce_over_processes
from fewtune.importance.prepared import backward_of, check_count, scoring_of
from fewtune.importance.scores import Scores, require_whole
from fewtune.neurons import ASK_MODEL, HeadSpec, Role
from fewtune.objectives import Objective, SupCon
from fewtune.quantised import seen_dequantised

CONSTANT = 8.0
"""A column is constant where its variance is within so many roundings of its mean square."""


@seen_dequantised
def correlation_importance(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective | None = None,
    head: HeadSpec = ASK_MODEL,
    *,
    roles: Mapping[str, str | Role] | None = None,
    exclude: Iterable[str] = (),
    train_mode: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    r"""The gradient that is left of each connection once its neuron's bias is trained, in units of its input.

    .. math:: s_{ij} = \frac{\big|\sum_n \delta_{ni} (X_{nj} - \bar X_j)\big|}{\mathrm{std}(X_j)}
        = N \frac{|\mathrm{cov}(\delta_i, X_j)|}{\mathrm{std}(X_j)}, \qquad \delta_{ni} = \partial L / \partial Y_{ni}

    Y = X W^T are the layer's outputs at all positions n: images, tokens, output pixels of a convolution, all batches
    together. Of inputs with mean 0 and variance 1 this is the modulus of the gradient (Eq. 1). Neither scaling a column
    (with its weights divided by as much) nor adding a constant to it (which the bias takes back) changes the score, so
    that columns which are always large are not preferred. A constant column has the score 0. The definition is the same
    for a layer without a bias.

    One pass over the data, exact for linear and convolution layers (grouped and transposed too): what is kept of a
    layer beside its summed gradient is one number a neuron and two a column.

    Args:
        model, loader, objective, head, roles, exclude, train_mode, limit, progress: as in `gradient_importance`.

    Raises:
        ImportanceError: as `gradient_importance`, and where a weight that gets scores is never given to a linear or
            convolution function: reparametrised, recurrent, or inside ``nn.MultiheadAttention``.
        SelectionError: a pattern of ``exclude`` matches no module, or nothing is left.
        ModelError: ``head`` names no module.
    """
    check_count("limit", limit)
    anatomy, weights = scoring_of(model, head, roles, exclude)
    require_whole(weights, "correlation_importance")
    columns = ColumnSums(weights, anatomy.views, gradients=True)
    with left_as_found(model, train_mode), columns:
        gradients = accumulate(
            model,
            loader,
            objective or SupCon(),
            weights,
            backward=backward_of(objective, head, train_mode),
            limit=limit,
            progress=progress,
        )
    columns.check("correlation")
    reduce_over_processes(gradients, weights)
    columns.reduced(reduce_over_processes)
    return Scores({name: _correlation(gradients[name], name, columns) for name in weights}, anatomy)


def _correlation(gradient: Tensor, name: str, columns: ColumnSums) -> Tensor:
    mean, square = columns.moments(name)
    variance = square - mean.square()
    constant = variance <= CONSTANT * torch.finfo(gradient.dtype).eps * square
    left = (gradient - columns.output_gradient(name) * mean).abs()
    return torch.where(constant, 0.0, left / variance.clamp(min=0).sqrt()).to(gradient.dtype)
