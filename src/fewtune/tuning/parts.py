"""Whether a model still has the modules and parameters that it had when a selection was attached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from fewtune.errors import TuningError
from fewtune.neurons import Owner


@dataclass(frozen=True)
class Parts:
    """What an attached model consists of.

    Attributes:
        owners: the first owner of each of the model's own parameters, by name.
        statistics: modules whose running statistics were frozen, by name.
    """

    owners: Mapping[str, Owner]
    statistics: Mapping[str, nn.Module]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by the names that they had; wrappers around its modules change nothing here."""
        held = {name: owner.module._parameters.get(owner.attribute) for name, owner in self.owners.items()}
        if lost := [name for name, parameter in held.items() if parameter is None]:
            raise _replaced(lost[0])
        return {name: parameter for name, parameter in held.items() if parameter is not None}

    def check_modules(self, model: nn.Module) -> None:
        """Check that every module is still in the model.

        Raises:
            TuningError: one was replaced; the message names it.
        """
        present = set(model.modules())
        for name, module in self.statistics.items():
            if module not in present:
                raise TuningError(
                    f"{name} was replaced after the selection was attached (as convert_sync_batchnorm does), which "
                    "thaws its running statistics: detach, convert the model first, then attach"
                )
        for name, owner in self.owners.items():
            if owner.module not in present:
                raise _replaced(name)

    def check(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """Check that the model has these parts and what is trained, and no parameter beside them.

        Raises:
            TuningError: a module was replaced, or a parameter was added; the message names it.
        """
        self.check_modules(model)
        known = {id(parameter) for parameter in (*self.parameters().values(), *trained)}
        for name, parameter in model.named_parameters():
            if id(parameter) not in known:
                raise TuningError(
                    f"the model has a parameter {name!r} that it did not have when the selection was attached (LoRA or "
                    "another library's, perhaps), which is not part of the task: take it out of the model first"
                )


def _replaced(name: str) -> TuningError:
    return TuningError(
        f"the module of {name!r} was replaced after the selection was attached (as reset_classifier does), and the new "
        "one is neither trained nor part of the task: detach, replace it first, then attach and make the optimizer anew"
    )
