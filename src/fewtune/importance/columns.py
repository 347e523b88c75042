"""What goes in and out of layers while a model runs: sums of every input column, and of every neuron's gradient.

Seen is a call of a linear or convolution function with one of the weights, by whatever module: no layer is hooked, so
that a weight which other code hands to ``F.linear`` counts too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewtune.errors import ImportanceError
from fewtune.neurons import View


class _Call(NamedTuple):
    """Arguments by position; whether the weight's second dimension holds the neurons, [in, out, ...]."""

    names: tuple[str, ...]
    inputs_first: bool = False


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_CALLS: dict[Callable[..., Any], _Call] = {
    F.linear: _Call(("input", "weight", "bias")),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _Call(_CONV)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _Call(_TRANSPOSED, True)),
    torch.addmm: _Call(("bias", "input", "weight"), True),
    **dict.fromkeys((torch.mm, torch.matmul, Tensor.matmul, Tensor.__matmul__), _Call(("input", "weight"), True)),
}


class ColumnSums(TorchFunctionMode):
    r"""While it is active, adds up over all positions n (images, tokens, pixels of the output) of each weight's calls

    .. math:: N, \quad \sum_n X_{nj}, \quad \sum_n X_{nj}^2, \quad \sum_n \partial L / \partial Y_{ni}

    with Y = X W^T. A convolution's columns are (channel, kernel position), its padding included; each of its groups has
    columns of its own. Sums over a column are the weight gradient of the same call with one neuron a group whose output
    gradient is 1 everywhere, so nothing is unfolded and no sample is kept.

    Args:
        weights: the weights by name; a call is told by the tensor itself.
        views: how each is seen.
        gradients: sum the gradients of outputs too, and see calls with gradients only.
    """

    def __init__(self, weights: Mapping[str, Tensor], views: Mapping[str, View], *, gradients: bool) -> None:
        super().__init__()
        self.weights, self.views, self.gradients = weights, views, gradients
        self._names = {id(weight): name for name, weight in weights.items()}
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._outputs = {
            name: torch.zeros(views[name].neurons, dtype=_wide(weight), device=weight.device)
            for name, weight in weights.items()
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        output = func(*args, **named)
        call = _CALLS.get(func)
        if call is not None and (torch.is_grad_enabled() or not self.gradients):
            given = dict(zip(call.names, args, strict=False)) | named
            name = self._names.get(id(given.get("weight")))
            if name is not None:
                self._record(name, func, call, args, named, output)
        return output

    def _record(self, name: str, func: Any, call: _Call, args: Any, named: dict[str, Any], output: Tensor) -> None:
        given = dict(zip(call.names, args, strict=False)) | named
        weight, bias = given["weight"], given.get("bias")
        wide = torch.promote_types(weight.dtype, torch.float32)
        x = given["input"].detach().to(wide)
        shape = weight.shape[1:] if not call.inputs_first else (1, *weight.shape[2:])
        first = weight.shape[0] if call.inputs_first else given.get("groups", 1)

        def again(values: Tensor, one: Tensor) -> Tensor:
            ours = {"input": values, "weight": one}
            if bias is not None:
                ours["bias"] = one.new_zeros(()) if func is torch.addmm else None  # type: ignore[assignment]
            placed = [ours.get(key, value) for key, value in zip(call.names, args, strict=False)]
            result: Tensor = func(*placed, **{key: ours.get(key, value) for key, value in named.items()})
            return result

        def summed(values: Tensor) -> Tensor:
            return column_sums(partial(again, values), x.new_zeros((first, *shape))).to(_wide(weight))

        sums = (torch.tensor(output.numel() / self.views[name].neurons), summed(x), summed(x.square()))
        before = self._sums.get(name)
        self._sums[name] = sums if before is None else tuple(map(torch.add, before, sums))  # type: ignore[assignment]
        if self.gradients and output.requires_grad:
            output.register_hook(partial(self._add, name, output.ndim + 1 - weight.ndim))

    def _add(self, name: str, channels: int, gradient: Tensor) -> None:
        self._outputs[name] += gradient.to(_wide(gradient)).movedim(channels, 0).flatten(1).sum(1)

    def unseen(self) -> list[str]:
        """Weights that were part of no call."""
        return [name for name in self.weights if name not in self._sums]

    def check(self, criterion: str) -> None:
        """ImportanceError where a weight was part of no call that is seen."""
        if unseen := self.unseen():
            raise ImportanceError(
                f"{criterion} looks at the inputs of linear and convolution layers, and saw none of {unseen[0]} (of "
                f"{len(unseen)} such weights: reparametrised, recurrent, or inside an attention module of torch): "
                "leave it out with exclude, or score by another criterion"
            )

    def reduced(self, reduce: Callable[[dict[str, Tensor], Mapping[str, Tensor]], None]) -> None:
        """Adds the sums of all processes to this one's, by `fewtune.importance.reduce_over_processes`."""
        for part in range(3):
            sums = {name: of[part] for name, of in self._sums.items()}
            reduce(sums, self.weights)
            self._sums = {n: (*of[:part], sums[n], *of[part + 1 :]) for n, of in self._sums.items()}  # type: ignore[misc]
        reduce(self._outputs, self.weights)

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and mean square of every connection's input column, each in the weight's shape."""
        count, total, squares = self._sums[name]
        return self._spread(name, total / count), self._spread(name, squares / count)

    def mean_squares(self, name: str) -> Tensor:
        """Of every input column, [groups, fan_in]; the neurons of a group have theirs in common."""
        count, _, squares = self._sums[name]
        view = self.views[name]
        return (squares / count).reshape(len(squares) if view.kind == "rows" else view.groups, -1)

    def output_gradient(self, name: str) -> Tensor:
        """The summed gradient of every connection's neuron, in the weight's shape."""
        view = self.views[name]
        return view.stored(self._outputs[name][:, None].expand(-1, view.fan_in))

    def _spread(self, name: str, of_groups: Tensor) -> Tensor:
        """From one neuron a group, [groups, ...] or [in, 1, ...], to all neurons."""
        shape = self.weights[name].shape
        if of_groups.shape[1:] == shape[1:]:
            return of_groups.repeat_interleave(shape[0] // len(of_groups), 0)
        return of_groups.expand(shape)


def column_sums(layer: Callable[[Tensor], Tensor], zeros: Tensor) -> Tensor:
    """The sum over all positions of each input column of a layer, in the shape of `zeros`.

    The gradient of sum(X w) by w is the sum of X's rows, so nothing is unfolded.

    Args:
        layer: its output, of a weight alone.
        zeros: a weight of one neuron a group; its dtype is that of the sums.
    """
    with torch.enable_grad():
        weight = zeros.requires_grad_()
        (sums,) = torch.autograd.grad(layer(weight).sum(), weight)
    return sums


def _wide(tensor: Tensor) -> torch.dtype:
    """Of sums over all positions."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
