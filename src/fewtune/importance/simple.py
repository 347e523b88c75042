"""Scores without a pass over data: the magnitude of a weight, chance, and how far full fine-tuning moved it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewtune.errors import ImportanceError
from fewtune.importance.scores import Scores, require_whole, scored_weights
from fewtune.neurons import ASK_MODEL, HeadSpec, Role
from fewtune.quantised import seen_dequantised
from fewtune.sharded import gathered, rows


@seen_dequantised
def magnitude_importance(
    model: nn.Module, head: HeadSpec = ASK_MODEL, *, roles: Mapping[str, str | Role] | None = None
) -> Scores:
    """The absolute value of every weight (the paper's "Magnitude"); arguments as in `gradient_importance`."""
    anatomy, weights = scored_weights(model, head, roles)
    return Scores({name: gathered(rows(weight.detach()).abs(), weight) for name, weight in weights.items()}, anatomy)


@seen_dequantised
def random_importance(
    model: nn.Module,
    seed: int = 0,
    head: HeadSpec = ASK_MODEL,
    *,
    roles: Mapping[str, str | Role] | None = None,
) -> Scores:
    """Uniform random scores, the same for one seed on any device.

    With granularity "neuron" the paper's random choice per neuron, with "network" over the whole network.
    """
    anatomy, _ = scored_weights(model, head, roles)
    generator = torch.Generator("cpu").manual_seed(seed)
    return Scores(
        {name: torch.rand(v.shape, generator=generator, device="cpu") for name, v in anatomy.views.items()}, anatomy
    )


@seen_dequantised
def difference_importance(
    model: nn.Module,
    tuned: Mapping[str, Tensor],
    head: HeadSpec = ASK_MODEL,
    *,
    roles: Mapping[str, str | Role] | None = None,
) -> Scores:
    r"""How far each connection is from where full fine-tuning takes it: the choice that Eq. 3-4 assume.

    .. math:: s_{ij} = | w^{full}_{ij} - w^{0}_{ij} |

    The paper's derivation keeps the connections that full fine-tuning would move most, and takes the gradient as a
    stand-in for that. This is the thing itself, known only once full fine-tuning is done: a yardstick, not a method.

    Args:
        model: the backbone before any tuning, w_0.
        tuned: the tuned numbers, by parameter name, of the weights' shapes: ``state_dict()`` of the tuned model, or
            ``delta.whole`` of its task file. Other names are ignored.
        head, roles: as in `fewtune.gradient_importance`.

    Raises:
        ImportanceError: a weight is missing or has another shape, is not finite, or is not moved at all.
        ModelError: ``head`` names no module.
    """
    anatomy, before = scored_weights(model, head, roles)
    require_whole(before, "difference_importance")
    if missing := [name for name in anatomy.views if name not in tuned]:
        raise ImportanceError(
            f"the tuned state has no {missing[0]} (of {len(missing)} weights that are missing); expected all weights "
            "of a full fine-tuning of this model"
        )
    scores = {}
    for name in anatomy.views:
        now, then = tuned[name].detach(), before[name].detach()
        if now.shape != then.shape:
            raise ImportanceError(
                f"the tuned {name} has shape {tuple(now.shape)} and the model's {tuple(then.shape)}; expected the "
                "state of the same model"
            )
        # In float32 at least: the difference of two half-precision weights would be rounded once more.
        wide = torch.promote_types(then.dtype, torch.float32)
        scores[name] = (now.to(then.device, wide) - then.to(wide)).abs()
    if unchanged := [name for name, score in scores.items() if not bool(score.any())]:
        raise ImportanceError(
            f"{unchanged[0]} is the same in the model and in the tuned state (as are {len(unchanged) - 1} more of "
            f"{len(scores)} weights); expected a full fine-tuning, which moves every weight"
        )
    return Scores(scores, anatomy)
