"""The class swap: a layer becomes a subclass of its own class, whose tuned tensors are trained through compact values.

Two ways lead to the gradient of the selected connections:

* a property in place of the attribute (``layer.weight``), which hands out the frozen tensor with a gradient that keeps
  the selected entries only: right for any use of the weight, by whatever code;
* a forward of its own for stock Linear and convolution layers, in which the dense gradient is never formed.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fewtune.errors import TuningError
from fewtune.sharded import is_sharded
from fewtune.tuning.forwards import fast_forward
from fewtune.tuning.functions import recorded
from fewtune.tuning.tensors import SELECTED, TunedTensor, write_shard


class Written(NamedTuple):
    """Which values were written: of which tensor, its version, and where its data lay."""

    tensor: weakref.ref[Tensor]
    version: int
    data: int

    @classmethod
    def of(cls, values: Tensor) -> Written:
        return cls(weakref.ref(values), _version(values), values.data_ptr())

    def still(self, values: Tensor) -> bool:
        """Whether these are the values that were written, unchanged."""
        return self.tensor() is values and self.version == _version(values) and self.data == values.data_ptr()


def _version(values: Tensor) -> int:
    return 0 if values.is_inference() else values._version  # inference tensors count no versions


@dataclass(eq=False)
class Swap:
    """What a swapped module remembers.

    ``written``: which values were last written into the frozen tensors. ``noise``: on what changed, in training.
    """

    base: type[nn.Module]
    tuned: dict[str, TunedTensor] = field(default_factory=dict)
    frozen_statistics: bool = False
    written: dict[str, Written] = field(default_factory=dict)
    noise: Any = None

    @property
    def kinds(self) -> Kinds:
        """What the subclass depends on, as a key."""
        statistics = (("training", STATISTICS),) if self.frozen_statistics else ()
        return tuple((attribute, tensor.suffix) for attribute, tensor in self.tuned.items()) + statistics


Kinds = tuple[tuple[str, str], ...]
STATISTICS = "running statistics"


SWAPPED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Every swapped module that is alive, copies included: what an optimiser's step hook looks through."""


class Tuned(nn.Module):
    """Mixed in before a layer's own class; see `swap` and `restore`."""

    _fewtune: Swap

    def _fewtune_frozen(self, attribute: str) -> Tensor:
        """The frozen tensor, into which values that were changed by hand are written first.

        A step of a torch optimiser writes them itself; this is for loops that do without one, and for averaged copies.
        A compiled model sees what was written before it runs, and nothing is looked up here.
        """
        if not torch.compiler.is_compiling():
            values = self._parameters[attribute + self._fewtune.tuned[attribute].suffix]
            written = self._fewtune.written.get(attribute)
            if values is not None and (written is None or not written.still(values)):
                _write(self, attribute)
        return self._parameters[attribute]  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for attribute, tensor in self._fewtune.tuned.items():
            values = self._parameters[attribute + tensor.suffix]
            if values is not None and fn(torch.empty(0, dtype=values.dtype)).dtype in (torch.float16, torch.bfloat16):
                raise TuningError(
                    "the model was cast to half precision after attach, which would round the trained values: "
                    "cast it first, then attach (trained values keep a float32 master)"
                )
        self._fewtune.written.clear()  # torch swaps no tensor that has weak references
        super()._apply(fn, recurse)
        for attribute, tensor in self._fewtune.tuned.items():
            values = self._parameters[attribute + tensor.suffix]
            assert values is not None
            self._fewtune.tuned[attribute] = tensor.to(values.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        write_values(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        with torch.no_grad():
            for attribute, tensor in self._fewtune.tuned.items():
                values, frozen = self._parameters[attribute + tensor.suffix], self._parameters[attribute]
                plain = prefix + attribute in state_dict and prefix + attribute + tensor.suffix not in state_dict
                if plain and values is not None and frozen is not None:
                    values.copy_(tensor.values(frozen))  # a plain state: they are in the weight
                    if strict:
                        missing_keys.remove(prefix + attribute + tensor.suffix)
        write_values(self)

    def __setattr__(self, name: str, value: Any) -> None:
        state = self.__dict__.get("_fewtune")
        if state is not None and name in state.tuned and isinstance(value, Tensor) and not is_sharded(value):
            if is_traceable_wrapper_subclass(value):
                raise TuningError(
                    f"{state.base.__name__}.{name} was replaced by {type(value).__name__} while a selection is "
                    "attached: convert or quantise the model first, then attach; or detach the selection first"
                )
            frozen = self._parameters[name]
            if frozen is not None and _same_memory(value, frozen):
                return  # tied to itself, as transformers' tie_weights does
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._fewtune.tuned:
            raise _reparametrised(self._fewtune.base, name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        for attribute in self._fewtune.tuned:
            if name.startswith(f"{attribute}_") and name not in self._parameters:
                raise _reparametrised(self._fewtune.base, attribute)
        super().register_parameter(name, param)

    def __prepare_scriptable__(self) -> nn.Module:
        raise TuningError("torch.jit.script cannot compile an attached model: detach the selection first")

    def _replicate_for_data_parallel(self) -> Any:
        raise TuningError("nn.DataParallel cannot run an attached model; use DistributedDataParallel")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass is made anew from the layer's own class, so that copies and pickles need no dynamic class.
        state = self.__dict__ | {"_fewtune": replace(self._fewtune, written={})}
        return _rebuild, (self._fewtune.base, self._fewtune.kinds), state


def _reparametrised(base: type[nn.Module], attribute: str) -> TuningError:
    return TuningError(
        f"{base.__name__}.{attribute} was to be reparametrised (parametrization, pruning, weight norm, …) while a "
        "selection is attached: do that first, then select and attach; or detach the selection first"
    )


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if one is other or one.is_meta or other.is_meta or one.layout != other.layout:
        return one is other
    return one.shape == other.shape and one.stride() == other.stride() and one.data_ptr() == other.data_ptr()


def _rebuild(base: type[nn.Module], kinds: Kinds) -> nn.Module:
    cls = _subclass(base, kinds)  # type: ignore[arg-type]
    module = cls.__new__(cls)
    SWAPPED.add(module)
    return module


_GET_PARAMETER = nn.Module.get_parameter.__code__


def _trained_property(attribute: str) -> property:
    def get(self: Any) -> Tensor:
        tensor = self._fewtune.tuned[attribute]
        values = self._parameters[attribute + tensor.suffix]
        if is_sharded(values):
            return self._parameters[attribute]  # FSDP asks for its parameter; it computes with whole ones
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is _GET_PARAMETER:
            return self._fewtune_frozen(attribute)  # asked for is the registered parameter, as by tie_weights
        if not recorded(values):
            return self._fewtune_frozen(attribute)
        return tensor.with_gradient(values, self._fewtune_frozen(attribute))

    return property(get)


def _never_training() -> property:
    """In place of ``training``: what is set is remembered, for `restore`, but batch statistics are never used."""

    def set_(self: Any, mode: bool) -> None:
        self.__dict__["training"] = mode

    return property(lambda self: False, set_)


def _flat_weights() -> property:
    """In place of the list in which recurrent layers keep their weights: they are read from the attributes instead."""

    def get(self: Any) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def set_(self: Any, weights: list[Tensor | None]) -> None:
        self.__dict__["_flat_weights"] = weights  # for `restore`

    return property(get, set_)


@cache
def _subclass(base: type[nn.Module], kinds: Kinds) -> type[nn.Module]:
    body: dict[str, Any] = {
        attribute: _never_training() if kind == STATISTICS else _trained_property(attribute)
        for attribute, kind in kinds
    }
    forward = fast_forward(base) if ("weight", SELECTED) in kinds else None
    if forward is not None:
        body["forward"] = forward
    if issubclass(base, nn.RNNBase):
        body["_flat_weights"] = _flat_weights()
    body["__module__"] = __name__
    return type(f"Tuned{base.__name__}", (Tuned, base), body)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls


def swap(module: nn.Module) -> Swap:
    """Makes a module a `Tuned` one, or finds that it is; returns what it remembers."""
    if not isinstance(module, Tuned):
        base = type(module)
        module.__dict__["_fewtune"] = Swap(base)
        _set_class(module, _subclass(base, ()))  # type: ignore[arg-type]
        SWAPPED.add(module)
    swapped: Any = module
    return swapped._fewtune


def tune(module: nn.Module, attribute: str, tensor: TunedTensor, values: nn.Parameter) -> None:
    """From now on ``module.attribute`` is trained through ``values``, registered on the module beside it."""
    state = swap(module)
    nn.Module.register_parameter(module, attribute + tensor.suffix, values)
    state.tuned[attribute] = tensor
    state.written[attribute] = Written.of(values)
    _set_class(module, _subclass(state.base, state.kinds))  # type: ignore[arg-type]


def freeze_statistics(module: nn.Module) -> None:
    """From now on the module uses its running statistics and never updates them."""
    state = swap(module)
    state.frozen_statistics = True
    _set_class(module, _subclass(state.base, state.kinds))  # type: ignore[arg-type]


def restore(module: nn.Module) -> None:
    """The inverse of `swap`: the module's own class again, without the parameters registered beside its own."""
    if not isinstance(module, Tuned):
        return
    state = module._fewtune
    for attribute, tensor in state.tuned.items():
        del module._parameters[attribute + tensor.suffix]
    if state.noise is not None:
        state.noise.remove()
    del module.__dict__["_fewtune"]
    _set_class(module, state.base)
    SWAPPED.discard(module)


@torch.no_grad()
def write_values(module: nn.Module, *, changed: bool = False) -> None:
    """Writes a swapped module's values into its frozen tensors.

    ``changed``: that they differ is known. Left out, they are compared first, since a write makes autograd refuse the
    backward pass of a forward pass done before.
    """
    if isinstance(module, Tuned):
        for attribute, tensor in module._fewtune.tuned.items():
            values, frozen = module._parameters[attribute + tensor.suffix], module._parameters[attribute]
            assert values is not None
            assert frozen is not None
            if changed or frozen.is_meta or is_sharded(values) or not tensor.holds(values, frozen):
                _write(module, attribute)
            else:  # written through another owner, as tied weights are; a second write in a forward pass is an error
                module._fewtune.written[attribute] = Written.of(values)


@torch.no_grad()
def _write(module: Any, attribute: str) -> None:
    tensor = module._fewtune.tuned[attribute]
    values, frozen = module._parameters[attribute + tensor.suffix], module._parameters[attribute]
    if is_sharded(values):
        write_shard(tensor, values, frozen)
    else:
        tensor.write(values.detach(), frozen.detach())
        module._fewtune.written[attribute] = Written.of(values)
