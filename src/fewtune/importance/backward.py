"""The backward pass of one batch of a scoring pass: of all at once, or of one view after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewtune.errors import ImportanceError
from fewtune.objectives import Objective, SupCon


def backward_at_once(objective: Objective, model: nn.Module, inputs: Any, labels: Tensor) -> None:
    """Backward of the objective as it is.

    Raises:
        ImportanceError: it gives no scalar, or one that depends on no weight that is scored.
    """
    loss = objective(model, inputs, labels)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ImportanceError(f"the objective gave {loss!r}; expected a scalar tensor")
    _must_depend_on_weights(loss)
    loss.backward()


def backward_by_views(objective: SupCon, model: nn.Module, inputs: Any, labels: Tensor) -> None:
    r"""The same gradient, with what one view needs for its backward pass in memory at a time.

    The loss depends on the weights through the features f_v of the views alone, so that

    .. math:: \partial L / \partial w = \sum_v (\partial L / \partial f_v) (\partial f_v / \partial w)

    The features of all views are computed first and the gradient by them is taken; then each view goes through the
    model again (the last one needs not) and backward from its part of that gradient (Gao et al. 2021).
    It adds to the weights' gradients once a view. Right only where an image's features depend on no other image of the
    batch and on no chance: a model in evaluation mode, with the model's own pooled features.
    """
    views = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    with torch.no_grad():
        features = [objective.embed(model, view) for view in views[:-1]]
    last = objective.embed(model, views[-1])
    _must_depend_on_weights(last)
    seen = torch.cat([*features, last.detach()]).requires_grad_()
    (gradient,) = torch.autograd.grad(objective.of_features(seen, torch.cat([labels] * len(views))), seen)
    *parts, of_last = gradient.split([len(view) for view in views])
    last.backward(of_last)
    del last
    for view, part in zip(views[:-1], parts, strict=True):
        objective.embed(model, view).backward(part)


def _must_depend_on_weights(output: Tensor) -> None:
    if not output.requires_grad:
        raise ImportanceError("the objective does not depend on the model's weights")
