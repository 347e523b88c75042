"""The autograd functions through which selected connections are trained.

Every one takes (…, values, frozen, …), computes with the frozen tensor, into which the values have been written, and
gives its gradient to the values. None can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewtune.errors import TuningError
from fewtune.tuning.ops import (
    ConvShape,
    Form,
    SelectedPlaces,
    channels_last,
    conv_keep,
    conv_selected_gradient,
    fused_gradients,
    fused_keep,
    fusible,
    linear_keep,
    linear_selected_gradient,
)

Backward = Callable[[Any, Tensor], Any]


def first_order(backward: Backward) -> Backward:
    """A backward pass that refuses to be differentiated, and that adds in float32 even within autocast."""

    @wraps(backward)
    def checked(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise TuningError(
                "a tuned layer was differentiated twice (create_graph=True), which it does not support: "
                "detach the selection for second derivatives"
            )
        if not torch.compiler.is_compiling() and _batched(grad):
            raise TuningError(
                "a tuned layer was given a batch of gradients at once (is_grads_batched or vmap), which it does not "
                "support: take them one after the other, or detach the selection first"
            )
        if not _autocast(grad):
            return backward(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return checked


def recorded(values: Tensor) -> bool:
    """Whether autograd records what is done with the values.

    Raises:
        TuningError: it does so by one of torch.func's transforms, or for a trace, which see no compact values.
    """
    if torch.compiler.is_compiling():  # a compiler cannot be asked for more
        return torch.is_grad_enabled() and values.requires_grad
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled() or not values.requires_grad:
        return False
    if torch._C._are_functorch_transforms_active():
        raise TuningError(
            "an attached model was called within a transform of torch.func (grad, vmap, jvp, …), which cannot "
            "differentiate its compact values: detach the selection first, or call it within torch.no_grad()"
        )
    if torch.jit.is_tracing():
        raise TuningError(
            "torch.jit.trace met an attached model while gradients are recorded: trace within torch.no_grad(), or "
            "detach the selection first"
        )
    return True


def _autocast(x: Tensor) -> bool:
    """Whether autocast is on where x lies. (A compiler, which compiles for devices that have it, cannot be asked.)"""
    device = x.device.type
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def _batched(grad: Tensor) -> bool:
    return torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)


class SelectedWeight(torch.autograd.Function):
    """The frozen weight, with a gradient that keeps the selected entries: for any use of a weight."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, frozen: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.dtype = index, values.dtype
        return frozen.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.to_dense() if grad.is_sparse else grad
        selected = grad[torch.unravel_index(ctx.index, grad.shape)]
        return selected.to(ctx.dtype), None, None


class MasterWeight(torch.autograd.Function):
    """The frozen half-precision tensor, with a gradient for its float32 master."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, frozen: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return frozen.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to(ctx.dtype), None


def as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a matrix product as autocast casts them; as they are where it is off."""
    if not _autocast(x):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    x, weight = (t if t.dtype is torch.float64 else t.to(dtype) for t in (x, weight))
    return x, weight, bias if bias is None or bias.dtype is torch.float64 else bias.to(dtype)


def not_a_view(y: Tensor) -> Tensor:
    """The same tensor, not as a view: what a function returns may then be changed in place, as a layer's output may."""
    return torch.ops.aten._unsafe_view(y, y.shape)


class SelectedLinear(torch.autograd.Function):
    """y = x W^T + b; of dL/dW = dY^T X only the selected entries are formed (Eq. 5-6).

    The weight is saved by reference and cast again in backward; of x the columns that some neuron selected are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, places: SelectedPlaces, whole: bool
    ) -> Tensor:
        ctx.dtypes = x.dtype, values.dtype, None if bias is None else bias.dtype
        x, cast_weight, bias = as_autocast(x, weight, bias)
        ctx.places, ctx.fused, ctx.whole = places, fusible(x, cast_weight, values, bias, places), whole
        early = ctx.fused and not whole
        ctx.save_for_backward(fused_keep(x, places) if early else linear_keep(x, places, keep_whole=whole), weight)
        return not_a_view(F.linear(x, cast_weight, bias))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, weight = ctx.saved_tensors
        x_dtype, values_dtype, bias_dtype = ctx.dtypes
        rows = dy.reshape(-1, dy.shape[-1])  # a matrix: of more dimensions, matmul makes batches where strides are odd
        dx = dv = db = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight.to(dy.dtype)).to(x_dtype).view(*dy.shape[:-1], weight.shape[1])
        if ctx.fused:
            kept = fused_keep(kept, ctx.places) if ctx.whole else kept
            dv, db = fused_gradients(rows, kept, ctx.places)
            return dx, dv.to(values_dtype), None, db.to(bias_dtype) if ctx.needs_input_grad[3] else None, None, None
        if ctx.needs_input_grad[1]:
            dv = linear_selected_gradient(rows, kept, ctx.places, keep_whole=ctx.whole).to(values_dtype)
        if ctx.needs_input_grad[3]:
            db = rows.sum(0, dtype=bias_dtype)
        return dx, dv, None, db, None, None


class SelectedConv(torch.autograd.Function):
    """A convolution in one to three dimensions; of its weight gradient only the selected entries are formed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        places: SelectedPlaces,
        shape: ConvShape,
        form: Form,
    ) -> Tensor:
        ctx.dtypes = x.dtype, values.dtype, None if bias is None else bias.dtype
        x, cast_weight, bias = as_autocast(x, weight, bias)
        ctx.save_for_backward(conv_keep(x, places, shape, form=form), weight)
        ctx.places, ctx.shape, ctx.input_shape, ctx.channels_last = places, shape, x.shape, channels_last(x)
        ctx.form = form
        none = [0] * len(shape.stride)
        return not_a_view(
            torch.convolution(
                x, cast_weight, bias, shape.stride, shape.padding, shape.dilation, False, none, shape.groups
            )
        )

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, weight = ctx.saved_tensors
        x_dtype, values_dtype, bias_dtype = ctx.dtypes
        shape: ConvShape = ctx.shape
        dx = dv = db = None
        if ctx.needs_input_grad[0]:
            dx = conv_input_gradient(dy, weight.to(dy.dtype), shape, ctx.input_shape, ctx.channels_last).to(x_dtype)
        if ctx.needs_input_grad[1]:
            dv = conv_selected_gradient(dy, kept, ctx.places, shape, ctx.input_shape, ctx.form).to(values_dtype)
        if ctx.needs_input_grad[3]:
            db = dy.sum([0, *range(2, dy.ndim)], dtype=bias_dtype)
        return dx, dv, None, db, None, None, None


def conv_input_gradient(dy: Tensor, weight: Tensor, shape: ConvShape, input_shape: torch.Size, last: bool) -> Tensor:
    """dL/dx of a convolution, which needs the input's shape and memory format alone.

    The format is told by a tensor that is never written, so that no memory is touched for it on a CPU; without it the
    library would compute channels first and copy dy and dx there and back.
    """
    images, channels, *size = input_shape
    no_input = dy.new_empty(1).expand(input_shape)
    if last:
        no_input = dy.new_empty(images, *size, channels).movedim(-1, 1)
    none = [0] * len(shape.stride)
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy, no_input, weight, None, shape.stride, shape.padding, shape.dilation, False, none, shape.groups,
        [True, False, False],
    )  # fmt: skip
    return dx


def kept_anyway(x: Tensor) -> bool:
    """Whether the operation that made x saves x itself for its backward pass, so that a copy of columns frees nothing.

    True of ReLU, softmax, sigmoid, attention and others that need their result; views are looked through.
    """
    node = x.grad_fn
    while node is not None and type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and any(hasattr(type(node), saved) for saved in _RESULTS)


_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "TransposeBackward0", "PermuteBackward0"}
_RESULTS = ("_saved_result", "_saved_output", "_saved_out")
