"""The quantised tensors that are known, by what they have: torchao's of 8 bits, bitsandbytes' of 4.

Both keep integers, and a float scale for each block of them: w = scale * integer, or scale * table[integer].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_quantised(weight: Tensor) -> bool:
    """Whether a tensor's numbers are not its own: integers, or a class that says how it is dequantised."""
    return (
        not weight.is_floating_point()
        or type(weight).dequantize is not Tensor.dequantize
        or getattr(weight, "quant_state", None) is not None
    )


def scheme_of(weight: Tensor) -> str | None:
    """How a tensor is quantised, in words, such as "int8, one scale a row"; None where it is none that is known."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        return _four_bits(state)
    if type(weight).dequantize is Tensor.dequantize or getattr(weight, "qdata", None) is None:
        return None
    return _eight_bits(weight)


def dense_of(weight: Any) -> Tensor:
    """The numbers that a quantised tensor of a known scheme stands for: a new tensor in its float dtype."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        dense: Tensor = dequantize_4bit(weight.data, state)
        return dense
    return weight.dequantize().contiguous()  # type: ignore[no-any-return]


def logical_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of the numbers that a tensor stands for; two of 4 bits are stored in one byte."""
    state = getattr(weight, "quant_state", None)
    return tuple(weight.shape if state is None else state.shape)


def logical_dtype(weight: Tensor) -> torch.dtype:
    """Their dtype."""
    state = getattr(weight, "quant_state", None)
    dtype: torch.dtype = weight.dtype if state is None else state.dtype
    return dtype


def _eight_bits(weight: Any) -> str | None:
    """torchao's Int8Tensor, of the weights alone: where activations are rounded too, the numbers are not all."""
    block, shape = list(getattr(weight, "block_size", [])), list(weight.shape)
    also = ("act_quant_kwargs", "act_pre_scale", "act_quant_scale")
    if weight.qdata.dtype is not torch.int8 or any(getattr(weight, name, None) is not None for name in also):
        return None
    if block == shape:
        return "int8, one scale a weight"
    if len(block) == len(shape) and block[:-1] == [1] * (len(shape) - 1):
        return "int8, one scale a row" if block[-1] == shape[-1] else f"int8, one scale for {block[-1]} connections"
    return None


def _four_bits(state: Any) -> str:
    """bitsandbytes' QuantState: nf4 or fp4; its scales may be of 8 bits themselves."""
    nested = ", scales of 8 bits" if state.nested else ""
    return f"{state.quant_type}, one scale for {state.blocksize} connections{nested}"
