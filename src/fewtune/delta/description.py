"""The JSON part of a delta file: its backbone and its packed numbers, read strictly."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewtune.delta.fingerprint import Covered
from fewtune.delta.packing import Layout
from fewtune.neurons import LARGEST, Anatomy, Role, sizes

LIMIT = 16 * 2**20
"""Most bytes of JSON that are looked at."""
EXPANSION, FLOOR = 64, 2**20
"""Packed JSON expands to at most so many times its length, or so many bytes, whichever is more."""


@dataclass(frozen=True)
class Description:
    """Everything of a delta file that is not a number of the task.

    Attributes:
        anatomy: of the backbone with the task's head.
        dense: role -> names of the parameters of that role that are trained whole.
        layers: how each selected weight's places are packed, in their order.
        bits: of an integer in the tables and in the places.
        buffers: shapes of the changed buffers.
        dtypes: dtype of every stored tensor, by name.
        covered: what the fingerprint covers.
        quantised: how weights of the backbone are quantised, by name.
    """

    anatomy: Anatomy
    dense: Mapping[Role, tuple[str, ...]]
    layers: Mapping[str, Layout]
    bits: tuple[int, int]
    buffers: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    covered: Mapping[str, Covered]
    quantised: Mapping[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor, in the order in which their numbers stand."""
        return _stored_shapes(self.anatomy, self.dense, self.layers, self.buffers)

    def to_bytes(self) -> bytes:
        # What nearly all tensors have in common is said once: the dtype, and that numbers are floating-point.
        by_dtype = {
            kind: [n for n, k in self.dtypes.items() if k == kind] for kind in dict.fromkeys(self.dtypes.values())
        }
        usual = max(by_dtype, key=lambda kind: len(by_dtype[kind]))
        parameters = self.anatomy.shapes
        content = {
            "anatomy": self.anatomy.to_json(),
            "dense": {role.value: list(names) for role, names in self.dense.items()},
            "layers": {name: [form.count, form.hot, form.gaps] for name, form in self.layers.items()},
            "bits": list(self.bits),
            "buffers": {name: list(size) for name, size in self.buffers.items()},
            "dtype": usual,
            "other dtypes": {kind: names for kind, names in by_dtype.items() if kind != usual},
            "integer parameters": [n for n, c in self.covered.items() if n in parameters and not c.floating],
            "known buffers": {n: [list(c.shape), c.floating] for n, c in self.covered.items() if n not in parameters},
        }
        if self.quantised:
            content["quantised"] = {
                words: [n for n, said in self.quantised.items() if said == words]
                for words in dict.fromkeys(self.quantised.values())
            }
        return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)

    @classmethod
    def from_bytes(cls, data: bytes) -> Description:
        """The inverse of `to_bytes`.

        Raises:
            ValueError, LookupError, TypeError, AttributeError, RecursionError, zlib.error: it is damaged.
        """
        decoder = zlib.decompressobj()
        plain = decoder.decompress(data, min(LIMIT, max(FLOOR, EXPANSION * len(data))))
        if not decoder.eof or decoder.unused_data:
            raise ValueError("the description of the model is damaged")
        content = _object(json.loads(plain))
        anatomy = Anatomy.from_json(_object(content["anatomy"]))
        integer = _names(content["integer parameters"], anatomy.shapes)
        covered = {
            n: Covered(s, n not in integer) for n, s in anatomy.shapes.items() if anatomy.roles.get(n) is not Role.HEAD
        }
        covered |= {
            name: Covered(sizes(size), _flag(floating))
            for name, (size, floating) in _object(content["known buffers"]).items()
        }
        dense = {Role(role): _names(names, anatomy.shapes) for role, names in _object(content["dense"]).items()}
        layers = {name: _layout(form) for name, form in _object(content["layers"]).items()}
        buffers = {name: sizes(size) for name, size in _object(content["buffers"]).items()}
        shapes = _stored_shapes(anatomy, dense, layers, buffers)
        others = {n: k for k, names in _object(content["other dtypes"]).items() for n in _names(names, shapes)}
        for name, form in layers.items():
            view = anatomy.views[name]
            if form.count > view.neurons * view.fan_in or form.hot > min(view.fan_in, form.count):
                raise ValueError(f"{name} states more places, or more hot columns, than it has")
        if any(name not in covered or covered[name].shape != size for name, size in buffers.items()):
            raise ValueError("a buffer has another shape than the backbone's")
        return cls(
            anatomy,
            dense,
            layers,
            (_number(content["bits"][0]), _number(content["bits"][1])),
            buffers,
            dtypes={name: others.get(name, content["dtype"]) for name in shapes},
            covered=covered,
            quantised={
                name: words
                for words, names in _object(content.get("quantised", {})).items()
                for name in _names(names, anatomy.shapes)
            },
        )


def _stored_shapes(
    anatomy: Anatomy,
    dense: Mapping[Role, tuple[str, ...]],
    layers: Mapping[str, Layout],
    buffers: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    named = [name for names in dense.values() for name in names]
    whole = {name: anatomy.shapes[name] for name in (*named, *anatomy.named(Role.HEAD))}
    return {**{name: (form.count,) for name, form in layers.items()}, **whole, **buffers}


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a part of the description is no JSON object")
    return value


def _number(value: Any) -> int:
    """A whole number; JSON's true and 1.0 are none."""
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError("a length or a size is no whole number in range")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("a flag is neither true nor false")
    return value


def _layout(value: Any) -> Layout:
    count, hot, gaps = value
    return Layout(_number(count), _number(hot), _flag(gaps))


def _names(value: Any, known: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name in known for name in value):
        raise ValueError("a list of names is damaged")
    return tuple(value)
