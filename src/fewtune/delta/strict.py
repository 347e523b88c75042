"""Reading a file's JSON, which may say anything: what is not exactly of the expected form is a ValueError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewtune.delta.fingerprint import Covered
from fewtune.delta.packing import Layout
from fewtune.neurons import Anatomy, Role, View


def mapping(value: Any, what: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object")
    return value


def number(value: Any) -> int:
    """An integer from 0 to 2**48; JSON's true, 1.0 and huge integers are none."""
    if type(value) is not int or not 0 <= value <= 2**48:
        raise ValueError("a length or a shape is not a whole number in range")
    return value


def shape(value: Any) -> tuple[int, ...]:
    """A tensor's shape."""
    if not isinstance(value, list):
        raise ValueError("a shape is no list")
    return tuple(number(size) for size in value)


def layout(value: Any) -> Layout:
    """How a layer's places are packed."""
    count, hot, gaps = value
    if not isinstance(gaps, bool):
        raise ValueError("a layer's layout is damaged")
    return Layout(number(count), number(hot), gaps)


def covered(value: Any) -> Covered:
    """What a fingerprint says of a tensor."""
    size, floating = value
    if not isinstance(floating, bool):
        raise ValueError("the fingerprint's list of tensors is damaged")
    return Covered(shape(size), floating)


def names(value: Any, known: Mapping[str, Any]) -> tuple[str, ...]:
    """A list of names, each known."""
    if not isinstance(value, list) or not all(isinstance(name, str) and name in known for name in value):
        raise ValueError("a list of parameters is damaged")
    return tuple(value)


def anatomy(value: Any) -> Anatomy:
    """A model's anatomy: every parameter is a weight of neurons or has a role."""
    data = mapping(value, "the anatomy")
    shapes = {name: shape(size) for name, size in mapping(data["shapes"], "the list of shapes").items()}
    views = {name: _view(v) for name, v in mapping(data["views"], "the list of weights").items()}
    roles = {name: Role(role) for name, role in mapping(data["roles"], "the list of roles").items()}
    if views.keys() | roles.keys() != shapes.keys() or views.keys() & roles.keys():
        raise ValueError("the anatomy is not complete")
    if any(view.shape != shapes[name] for name, view in views.items()):
        raise ValueError("a weight has two shapes")
    return Anatomy(views, roles, shapes)


def _view(value: Any) -> View:
    size, kind, groups = shape(value[0]), value[1], number(value[2])
    enough = {"rows": 1, "columns": 2, "transposed": 2}
    if kind not in enough or len(size) < enough[kind] or (kind == "columns" and len(size) != 2):
        raise ValueError("a weight's view is damaged")
    if groups < 1 or (kind == "transposed" and size[0] % groups):
        raise ValueError("a weight's groups do not fit its shape")
    return View(size, kind, groups)
