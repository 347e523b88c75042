"""Quantising the linear layers of a model, by the library that does it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

from torch import Tensor, nn

from fewtune.errors import MissingExtra, ModelError
from fewtune.quantised.overlay import Overlay
from fewtune.quantised.schemes import is_quantised


def quantise(model: nn.Module, word: str, head: Collection[str] = ()) -> nn.Module:
    """Quantises the weights of a model's linear layers in place; biases, norms and convolutions stay as they are.

    The layers compute with the dense numbers, made for one operation at a time (`Overlay`).

    Args:
        model: in float32, float16 or bfloat16.
        word: a key of `SCHEMES`: "int8" (by torchao) or "nf4" (4 bits, by bitsandbytes).
        head: names of the modules that are trained whole, which are left as they are.

    Raises:
        ModelError: the word is unknown, the model is quantised already, or it has no linear layer outside its
            head.
        MissingExtra: the library is not installed.
    """
    if word not in SCHEMES:
        raise ModelError(f"quantise={word!r}; expected one of {', '.join(SCHEMES)}")
    left = {id(module) for name in head for module in model.get_submodule(name).modules()}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in left]
    if not layers:
        raise ModelError(f"quantise={word}: the model has no linear layer outside its head; leave quantise out")
    if any(is_quantised(layer.weight) for layer in layers):
        raise ModelError(f"quantise={word}: the model is quantised already; load it in full precision, or leave it out")
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # with the weight, so that its id is of no other
    for layer in layers:
        weight = layer.weight
        if id(weight) not in made:
            overlay = Overlay.of(SCHEMES[word](weight.detach()))
            made[id(weight)] = weight, nn.Parameter(overlay, requires_grad=weight.requires_grad)
        layer.weight = made[id(weight)][1]
    return model


def _int8(weight: Tensor) -> Tensor:
    try:
        from torchao.quantization import Int8Tensor, PerRow
    except ImportError as error:
        raise MissingExtra("torchao", "int8") from error
    made: Tensor = Int8Tensor.from_hp(weight, granularity=PerRow())
    return made


def _nf4(weight: Tensor) -> Tensor:
    try:
        from bitsandbytes.nn import Params4bit
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "nf4") from error
    packed: Any = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    made: Tensor = packed.to(weight.device)  # which is when it quantises
    return made


SCHEMES: Final[dict[str, Callable[[Tensor], Tensor]]] = {"int8": _int8, "nf4": _nf4}
"""By the word of recipes: what quantises one weight."""
_WORDS: Final = {"int8, one scale a row": "int8", "nf4, one scale for 64 connections": "nf4"}


def requantised(weight: Tensor, scheme: str) -> Tensor | None:
    """A weight in full precision quantised by a scheme, where it is that of a word of `SCHEMES`; else None.

    Raises:
        MissingExtra: the library that does it is not installed.
    """
    word = _WORDS.get(scheme)
    return None if word is None else SCHEMES[word](weight.detach())
