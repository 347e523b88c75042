"""Running a model only up to its border, or only from it on: what lies below is frozen and need not run twice.

The model's own forward is used both times. Up to the border it is left by an exception; from the border on the modules
below hand out zeros of the shapes that they gave before, and the border is given what was kept instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fewtune.errors import TuningError
from fewtune.methods.reach import Border


class _AtBorder(Exception):
    """Carries what the border was given out of the model's forward."""

    def __init__(self, given: Any) -> None:
        self.given = given


class Shortcut:
    """The two halves of a model. `below` must have run once before `above` can."""

    def __init__(self, model: nn.Module, border: Border) -> None:
        self.model, self.border = model, border
        self._outputs: dict[str, list[Any]] = {}
        self._images: tuple[int, ...] = ()

    @torch.no_grad()
    def below(self, images: Tensor) -> Tensor:
        """What the border is given for these images, [B, ...]; nothing from the border on is run.

        Raises:
            TuningError: the border is given no tensor that goes with the batch.
        """

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _AtBorder(args[0] if args else None)

        outputs: dict[str, list[Any]] = {name: [] for name in self.border.below}
        hooks = [
            module.register_forward_hook(partial(_note, outputs[name], len(images)))
            for name, module in self.border.below.items()
        ]
        hooks.append(self.border.module.register_forward_pre_hook(leave, with_kwargs=True))
        try:
            self.model(images)
        except _AtBorder as at:
            given = at.given
        else:
            raise TuningError(f"the model's forward pass never runs {self.border.name}, where training is to begin")
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(given, Tensor) or given.shape[:1] != images.shape[:1]:
            raise TuningError(
                f"{self.border.name} is given no tensor [images, ...], so what it is given cannot be kept"
            )
        self._outputs, self._images = outputs, tuple(images.shape[1:])
        return given

    def above(self, given: Tensor) -> object:
        """What the model returns where the border is given this, [B, ...]."""
        images = given.new_zeros(1).expand(len(given), *self._images)
        with self._skipping(len(given)) as skip:

            def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                skip.clear()
                return (given, *args[1:]), kwargs

            hook = self.border.module.register_forward_pre_hook(put, with_kwargs=True, prepend=True)
            try:
                return self.model(images)
            finally:
                hook.remove()

    @torch.no_grad()
    def check(self, images: Tensor) -> Tensor:
        """Check that the two halves give what the whole gives; returns what the border is given.

        Raises:
            TuningError: they do not: something below the border reaches past it by another way.
        """
        given = self.below(images)
        halves, whole = self.above(given), self.model(images)
        if not _equal(halves, whole):
            raise TuningError(
                f"the model's output depends on more from below {self.border.name} than what it is given, so the part "
                "below cannot be kept; take keep_prefix=none"
            )
        return given

    @contextmanager
    def _skipping(self, batch: int) -> Iterator[set[str]]:
        """Until the yielded set is cleared, the modules below give zeros and do not run."""
        active, forwards = {"below"}, dict[str, Any]()
        for name, module in self.border.below.items():
            forwards[name] = module.__dict__.get("forward")
            module.forward = _stand_in(module.forward, self._outputs[name], batch, active)
        try:
            yield active
        finally:
            for name, module in self.border.below.items():
                del module.forward
                if forwards[name] is not None:
                    module.forward = forwards[name]


def _note(noted: list[Any], batch: int, module: nn.Module, args: Any, output: Any) -> None:
    """Shapes of what a module gave, with -1 in place of the number of images."""

    def shape(tensor: Tensor) -> Any:
        size = [-1, *tensor.shape[1:]] if tensor.shape[:1] == (batch,) else list(tensor.shape)
        return partial(_zeros, size, tensor.dtype, tensor.device)

    noted.append(tree_map_only(Tensor, shape, output))


def _zeros(size: list[int], dtype: torch.dtype, device: torch.device, batch: int) -> Tensor:
    return torch.zeros([batch if length == -1 else length for length in size], dtype=dtype, device=device)


def _stand_in(real: Callable[..., Any], outputs: list[Any], batch: int, active: set[str]) -> Callable[..., Any]:
    calls = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not active:
            return real(*args, **kwargs)
        return tree_map_only(partial, lambda make: make(batch), next(calls))

    return forward


def _equal(one: Any, other: Any) -> bool:
    first, second = (getattr(output, "logits", output) for output in (one, other))
    return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
