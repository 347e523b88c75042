"""The modules that hold a model's tensors, and how the tensors are replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Holder(NamedTuple):
    """A module that holds a tensor, and the attribute that holds it."""

    module: nn.Module
    attribute: str

    @property
    def group(self) -> dict[str, Tensor | None]:
        """The module's own dictionary that the tensor stands in."""
        parameters: dict[str, Tensor | None] = self.module._parameters  # type: ignore[assignment]
        return parameters if self.attribute in parameters else self.module._buffers

    @property
    def tensor(self) -> Tensor:
        """What stands there now."""
        tensor = self.group[self.attribute]
        assert tensor is not None
        return tensor.detach()


def holders_of(model: nn.Module) -> dict[str, list[Holder]]:
    """Every place that holds a parameter or a buffer, by the tensor's first name; tied tensors have several."""
    names: dict[int, str] = {}
    result: dict[str, list[Holder]] = {}
    for module_name, module in model.named_modules():
        for group in (module._parameters, module._buffers):
            for attribute, tensor in group.items():
                if tensor is not None:
                    name = names.setdefault(id(tensor), f"{module_name}.{attribute}" if module_name else attribute)
                    result.setdefault(name, []).append(Holder(module, attribute))
    return result


@contextmanager
def replaced(tensors: Mapping[Holder, Tensor]) -> Iterator[None]:
    """Other tensors in the place of a model's own, of any shape; the model's own are not written to."""
    originals = {holder: holder.group[holder.attribute] for holder in tensors}
    try:
        for holder, tensor in tensors.items():
            holder.group[holder.attribute] = tensor
        yield
    finally:
        for holder, before in originals.items():
            holder.group[holder.attribute] = before
