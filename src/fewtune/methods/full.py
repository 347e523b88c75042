"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fewtune.delta import Delta, frozen_buffers, take
from fewtune.errors import TuningError
from fewtune.methods.base import Method, Run, State
from fewtune.neurons import Role, describe, require_float
from fewtune.selection import Selection
from fewtune.tuning.groups import ParamGroup, param_groups


class Full:
    """The tuner that trains a whole model; running statistics follow the data.

    It answers what the trainer asks of `fewtune.Tuner`, but keeps no copy of the original weights, so that its memory
    is that of plain full fine-tuning. `original()` makes the untouched model again, for the delta.
    """

    def __init__(self, model: nn.Module, head: tuple[str, ...], original: Callable[[], nn.Module]) -> None:
        self.model, self.original = model, original
        self.anatomy = describe(model, head)
        model.requires_grad_(True)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> trained parameter."""
        return dict(self.model.named_parameters())

    def parameters(self) -> list[nn.Parameter]:
        """Exactly what is trained."""
        return list(self.model.parameters())

    def param_groups(self, lr: float | None = None, head_lr: float | None = None) -> list[ParamGroup]:
        """Two groups for an optimiser, backbone and head, each with its learning rate where one is given."""
        return param_groups(self.named_parameters(), self.anatomy.named(Role.HEAD), lr, head_lr)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The whole model's state: all of it is trained."""
        return {"model": self.plain_state_dict()}

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The tuned model's state."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The same: nothing is added that would have to be merged."""
        return self.plain_state_dict()

    def load_state_dict(self, state: State) -> None:
        """Put a saved state back. TuningError where it is of another model."""
        try:
            # A run begun by fewtune 0.1.0 saved the model's state without a name.
            self.model.load_state_dict(dict(state.get("model", state)), strict=True)
        except RuntimeError as error:
            raise TuningError(f"the saved state is of another model: {error}") from None

    def sync(self) -> None:
        """Nothing to do: the trained parameters are the model's own."""

    def delta(self, metadata: Mapping[str, object] | None = None) -> Delta:
        """The whole tuned model as a task file in the making."""
        original = self.original()
        before = {name: tensor.detach() for name, tensor in original.named_parameters()}
        names = [name for name in before if self.anatomy.roles.get(name) is not Role.HEAD]
        dense = {
            role: tuple(name for name in names if self.anatomy.roles.get(name, Role.OTHER) is role) for role in Role
        }
        persistent = set(self.model.state_dict())
        now, then = (
            {name: buffer for name, buffer in model.named_buffers() if name in persistent}
            for model in (self.model, original)
        )
        changed = [name for name in now if not torch.equal(now[name].cpu(), then[name].cpu())]
        return take(
            Selection(self.anatomy, {}, {role: names for role, names in dense.items() if names}),
            {name: parameter.detach().cpu() for name, parameter in self.named_parameters().items()},
            before,
            buffers={name: now[name].cpu() for name in changed},
            buffers_before={name: then[name].cpu() for name in changed},
            frozen={name: b for name, b in frozen_buffers(original).items() if name not in changed},
            metadata=dict(metadata or {}),
        )

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def backbone_parameters(self) -> int:
        """Number of parameters outside the head."""
        return self.anatomy.backbone_parameters


def check(run: Run) -> None:
    """TuningError where a weight is quantised."""
    require_float(dict(run.model.named_parameters()), TuningError)


FULL = Method("full", lambda run, prepared: Full(run.model, run.head, original=run.fresh_model), check=check)
