"""The weights in an ONNX file, without the ONNX libraries.

An ONNX file is one protobuf message. Only what leads to the weights is read: ModelProto.graph (7), and in it
GraphProto.node (1) and GraphProto.initializer (5). Field numbers are those of onnx.proto3 (ONNX, Apache-2.0).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewtune.errors import ModelError

FLOAT, INT64 = 1, 7
DTYPES = {FLOAT: torch.float32, INT64: torch.int64}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Value = int | memoryview


@dataclass(frozen=True)
class Node:
    """One operation of the graph: "MatMul", its scope name "/encoder/layer.0/…/MatMul", names of its inputs."""

    operation: str
    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """All initialisers (name -> tensor, sharing the file's memory) and all nodes, in the file's order."""

    initialisers: dict[str, Tensor]
    nodes: tuple[Node, ...]


def read_onnx(data: bytes | bytearray) -> Graph:
    """The graph of an ONNX model given as bytes.

    Raises:
        ModelError: the bytes are no ONNX model, or a tensor is neither float32 nor int64 or is stored outside.
    """
    try:
        model = _fields(memoryview(data))
        graph = _fields(_bytes(model[7][0]))
        tensors = dict(_tensor(_bytes(message)) for message in graph[5])
        return Graph(tensors, tuple(_node(_bytes(message)) for message in graph[1]))
    except (IndexError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"this is not an ONNX model that can be read: {error}") from error


def _tensor(message: memoryview) -> tuple[str, Tensor]:
    """TensorProto: dims (1), data_type (2), name (8), raw_data (9)."""
    fields = _fields(message)
    name = str(_bytes(fields[8][0]), "utf-8")
    kind = fields[2][0]
    if kind not in DTYPES or not fields[9]:
        raise ValueError(f"the tensor {name} is not stored as raw float32 or int64")
    dims = [d for value in fields[1] for d in ([value] if isinstance(value, int) else _packed(value))]
    flat = torch.frombuffer(bytearray(_bytes(fields[9][0])), dtype=DTYPES[int(kind)])  # type: ignore[arg-type]
    return name, flat.reshape(dims)


def _node(message: memoryview) -> Node:
    """NodeProto: input (1), name (3), op_type (4)."""
    fields = _fields(message)
    text = {number: [str(_bytes(value), "utf-8") for value in fields[number]] for number in (1, 3, 4)}
    return Node(operation="".join(text[4]), name="".join(text[3]), inputs=tuple(text[1]))


def _fields(message: memoryview) -> defaultdict[int, list[Value]]:
    """A message's fields: number -> values in order."""
    fields: defaultdict[int, list[Value]] = defaultdict(list)
    for number, value in _pairs(message):
        fields[number].append(value)
    return fields


def _pairs(message: memoryview) -> Iterator[tuple[int, Value]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == BYTES:
            size, at = _varint(message, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        if at + size > len(message):
            raise ValueError("it is cut short")
        yield number, message[at : at + size]
        at += size


def _packed(values: memoryview) -> list[int]:
    fields, at = [], 0
    while at < len(values):
        value, at = _varint(values, at)
        fields.append(value)
    return fields


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Seven bits a byte, the least first; the eighth bit says that more follow. -> (value, next position)"""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _bytes(value: Value) -> memoryview:
    assert isinstance(value, memoryview), "a message was expected where a number stands"
    return value
