"""A quantised weight with float numbers over it at some places, as the one float tensor that both stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from fewtune.errors import TuningError
from fewtune.quantised.schemes import dense_of, is_quantised, logical_dtype, logical_shape, scheme_of

aten = torch.ops.aten


class Overlay(Tensor):
    """What is kept is the quantised weight, never changed, and the numbers at the places.

    Whatever computes with it computes with its dense numbers, made for that one operation. Since this happens beneath
    autograd, a backward pass that needs the weight keeps the overlay, not the dense numbers. A view, or a cast to
    another dtype, is made of the dense numbers each time they are asked for.

    Attributes:
        base: the quantised weight.
        places: flat positions in the weight's shape, int64 [n], each once.
        entries: the numbers there, [n], in the weight's dtype.
        steps: the views and casts that lead from the dense numbers to this tensor.
    """

    base: Tensor
    places: Tensor
    entries: Tensor
    steps: tuple[tuple[Any, tuple[Any, ...], Mapping[str, Any]], ...]

    @staticmethod
    def __new__(
        cls: type[Overlay], base: Tensor, places: Tensor, entries: Tensor, steps: Any = (), like: Tensor | None = None
    ) -> Overlay:
        """``like``: a tensor of the shape, strides and dtype after the steps."""
        if like is None:
            like = torch.empty(logical_shape(base), dtype=logical_dtype(base), device="meta")
        with torch.inference_mode(False):  # torch cannot detach nor view a wrapper that was made within
            made: Overlay = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, like.shape, strides=like.stride(), dtype=like.dtype, device=base.device
            )
        made.base, made.places, made.entries, made.steps = base, places, entries, tuple(steps)
        return made

    @classmethod
    def of(cls, weight: Tensor, index: Tensor | None = None) -> Overlay:
        """Over a quantised weight, or over an overlay's own; its numbers are those that the weight stands for.

        Args:
            weight: of a known scheme, or an overlay.
            index: flat positions that can be written; those of an overlay stay.
        """
        base, places = weight, torch.empty(0, dtype=torch.int64, device=weight.device)
        if isinstance(weight, Overlay):
            base, places = weight.base, weight.places
        if index is not None:
            index = index.reshape(-1).to(weight.device)
            places = index if not len(places) else torch.cat([places, index]).unique()
        with torch.inference_mode(False):  # so that the numbers can be written outside of it too
            return cls(base, places, dequantised(weight).view(-1)[places])

    def dequantize(self) -> Tensor:
        """The dense numbers, as a new tensor."""
        dense = dense_of(self.base)
        dense.view(-1)[self.places] = self.entries
        for function, args, named in self.steps:
            dense = function(dense, *args, **named)
        return dense

    def write(self, index: Tensor, values: Tensor) -> None:
        """Writes numbers at flat positions, which must be among the overlay's places."""
        if self.is_meta:
            return
        index, values = index.reshape(-1).to(self.device), values.reshape(-1).to(self.device, self.entries.dtype)
        if torch.equal(index, self.places):
            self.entries.copy_(values)
            return
        ordered, order = self.places.sort()
        at = torch.searchsorted(ordered, index).clamp(max=max(len(ordered) - 1, 0))
        if not len(ordered) or not torch.equal(ordered[at], index):
            raise _unwritable()
        self.entries[order[at]] = values

    def _with(self, base: Tensor, places: Tensor, entries: Tensor) -> Overlay:
        return Overlay(base, places, entries, self.steps, self._like())

    def _stepped(self, function: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Overlay:
        steps = (*self.steps, (function, args, named))
        return Overlay(self.base, self.places, self.entries, steps, function(self._like(), *args, **named))

    def _copied(self, device: torch.device, dtype: torch.dtype) -> Overlay:
        base = self.base
        if device != self.device:  # within a dispatch torchao's `to` stays where it is
            base = (
                aten._to_copy.default(base, device=device) if is_traceable_wrapper_subclass(base) else base.to(device)
            )
        copy = self._with(base, self.places.to(device, copy=True), self.entries.to(device, copy=True))
        return copy if dtype == self.dtype else copy._stepped(aten._to_copy.default, (), {"dtype": dtype})

    def _like(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Overlay({scheme_of(self.base)}, shape={tuple(self.shape)}, {len(self.places)} places)"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["base", "places", "entries"], self.steps

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], steps: Any, size: Any, stride: Any) -> Overlay:
        whole = Overlay(inner["base"], inner["places"], inner["entries"])
        like = torch.empty_strided(size, stride, dtype=whole.dtype, device="meta")
        return Overlay(whole.base, whole.places, whole.entries, steps, like)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        named = dict(kwargs or {})
        self = args[0] if args and isinstance(args[0], Overlay) else None
        if self is not None:
            match func:
                case aten.detach.default:
                    return self._with(self.base, self.places, self.entries)
                case aten.clone.default:
                    return self._copied(self.device, self.dtype)
                case aten._to_copy.default:
                    return self._copied(named.get("device") or self.device, named.get("dtype") or self.dtype)
                case aten.copy_.default:
                    return self._take(args[1])
                case _ if _is_view(func):
                    if func._can_decompose():  # such as aten.to, which comes whole in inference mode
                        return func.decompose(*args, **named)
                    return self._stepped(func, tuple(args[1:]), named)
        if func._schema.is_mutable and any(isinstance(a, Overlay) and _written(func, i) for i, a in enumerate(args)):
            raise _unwritable()
        return func(*tree_map(_dense, args), **tree_map(_dense, named))

    def _take(self, source: Tensor) -> Overlay:
        """Becomes the same as a tensor that differs from it at its places alone."""
        numbers = dequantised(source).to(self.device, self.dtype)
        before = self.entries.clone()
        self.entries.copy_(numbers.reshape(-1)[self.places])
        if self.steps or not torch.equal(self.dequantize(), numbers):
            self.entries.copy_(before)
            raise _unwritable()
        return self


def scheme(weight: Tensor) -> str | None:
    """How a weight is quantised, in words, such as "int8, one scale a row"; None where it is none that is known."""
    return scheme_of(weight.base if isinstance(weight, Overlay) else weight)


def dequantised(weight: Tensor) -> Tensor:
    """The numbers that a weight stands for: a new tensor where it is quantised, otherwise the weight itself."""
    if isinstance(weight, Overlay):
        return weight.dequantize()
    return dense_of(weight) if is_quantised(weight) and scheme_of(weight) is not None else weight


def dequantised_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state in which quantised weights are the float numbers that they stand for."""
    return {name: dequantised(tensor) for name, tensor in state.items()}


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Overlay) else value


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    one = len(returns) == 1 and isinstance(returns[0].type, torch.TensorType)
    return one and returns[0].alias_info is not None and not func._schema.is_mutable


def _written(func: Any, argument: int) -> bool:
    alias = func._schema.arguments[argument].alias_info
    return alias is not None and alias.is_write


def _unwritable() -> TuningError:
    return TuningError(
        "a quantised weight was to be changed at places that are not selected, where its numbers cannot be: load the "
        "backbone in float32 for that"
    )
