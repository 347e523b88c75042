"""A delta as bytes: one safetensors file of a few blocks of bytes.

* ``model``: zlib-compressed JSON: the backbone's anatomy, what is trained whole, how each layer's places are packed,
  the dtype of everything, what the fingerprint covers.
* ``fingerprint``: the backbone's hashes.
* ``tables``, ``places``: the hot columns of the layers and one integer a connection, packed (see `packing`).
* ``numbers.DTYPE``: the bits of all new numbers of that dtype, packed: of the selected connections, then of what was
  trained whole (biases, scales, head), then of buffers.

The header's only entry, ``fewtune``, is JSON: format, version, checksum (SHA-256 of the whole file with the checksum's
own 64 characters set to zero), dtype, number of connections, metadata. Nothing in a file is ever executed, every length
is checked against the bytes that are there before it is used, and what does not agree is refused.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from math import prod
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fewtune.delta.checks import as_json, check_contents
from fewtune.delta.description import LIMIT, Description
from fewtune.delta.fingerprint import Fingerprint
from fewtune.delta.packing import bit_length, decode_all, encode_all, pack, unpack
from fewtune.delta.task import Delta
from fewtune.errors import DeltaError, FewtuneError
from fewtune.files import write_bytes
from fewtune.selection import Selection

FORMAT = "fewtune-delta"
VERSION = 1
NO_CHECKSUM = "0" * 64
DAMAGE = (
    SafetensorError,
    FewtuneError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    RuntimeError,
    zlib.error,
)
"""What a damaged file may cause before it is found out."""
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, *BITS.values(), torch.int8)
}


def to_bytes(delta: Delta, dtype: torch.dtype | None = None) -> bytes:
    """The file's bytes; the same delta always gives the same. ``dtype``: as in `Delta.save`."""
    choice = delta.choice
    layouts, tables, integers = encode_all(choice.places)
    bits = bit_length(tables), bit_length(integers)
    numbers = {n: _rounded(n, delta.new(n), dtype) for n in (*layouts, *delta.whole, *delta.buffers)}
    description = Description(
        choice.anatomy,
        choice.dense,
        layouts,
        bits,
        buffers={name: tuple(buffer.shape) for name, buffer in delta.buffers.items()},
        dtypes={name: _name(tensor.dtype) for name, tensor in numbers.items()},
        covered=delta.fingerprint.tensors,
    )
    blocks = {
        "model": description.to_bytes(),
        "fingerprint": delta.fingerprint.to_bytes(),
        "tables": pack(tables, bits[0]),
        "places": pack(integers, bits[1]),
    }
    for kind in dict.fromkeys(tensor.dtype for tensor in numbers.values()):
        together = torch.cat([tensor.reshape(-1) for tensor in numbers.values() if tensor.dtype is kind])
        blocks[f"numbers.{_name(kind)}"] = pack_numbers(together)
    stored = {name: torch.frombuffer(bytearray(block), dtype=torch.uint8) for name, block in blocks.items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": NO_CHECKSUM,
        "dtype": "as trained" if dtype is None else _name(dtype),
        "connections": choice.connections,
        "metadata": as_json(delta.metadata),
    }
    content = safetensors.torch.save(stored, {"fewtune": json.dumps(header)})
    return content.replace(NO_CHECKSUM.encode(), _checksum(content, NO_CHECKSUM).encode(), 1)


def write_file(path: Path, content: bytes) -> None:
    """Raises:
    DeltaError: the file cannot be written.
    """
    try:
        write_bytes(path, content)
    except OSError as error:
        raise DeltaError(f"{path} cannot be written: {error.strerror or error}") from error


def load_delta(path: str | Path) -> Delta:
    """Reads a delta that `Delta.save` wrote.

    Raises:
        DeltaError: the file is missing, of another kind, of a newer version, truncated or altered.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(8)
            content += file.read(min(int.from_bytes(content, "little"), LIMIT))
            _header(content, str(path))  # before all of a large file of another kind is read
            content += file.read()
    except FileNotFoundError as error:
        raise DeltaError(f"{path} does not exist") from error
    except OSError as error:
        raise DeltaError(f"{path} cannot be read: {error.strerror or error}") from error
    return from_bytes(content, str(path))


def from_bytes(content: bytes, source: str = "the delta") -> Delta:
    """The inverse of `to_bytes`; ``source`` begins the error messages.

    Raises:
        DeltaError: as `load_delta`.
    """
    header = _header(content, source)
    present = header.get("checksum")
    if not isinstance(present, str) or not present.isascii() or present != _checksum(content, present):
        raise DeltaError(f"{source} is truncated or altered: its checksum does not agree; get the file again")
    try:
        delta = _decode(safetensors.torch.load(content), header)
        check_contents(delta)
    except DAMAGE as error:
        raise DeltaError(f"{source} is damaged: {_said(error)}") from error
    return delta


def _header(content: bytes, source: str) -> dict[str, Any]:
    """What a file says of itself, read from its beginning: the safetensors header is enough.

    Raises:
        DeltaError: it is no delta, or one of a newer version.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        if not 2 <= length <= min(LIMIT, len(content) - 8):
            raise ValueError("it has no safetensors header")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        if "fewtune" not in metadata:
            raise ValueError("it is a safetensors file of another program")
        header = dict(json.loads(metadata["fewtune"]))
        kind, version = str(header["format"]), header["version"]
    except DAMAGE as error:
        raise DeltaError(f"{source} is not a delta file, or its beginning is damaged: {_said(error)}") from error
    if kind != FORMAT:
        raise DeltaError(f"{source} is a {kind[:80]!r} file; expected a {FORMAT}")
    if type(version) is int and version > VERSION:
        raise DeltaError(f"{source} has version {version}; this fewtune reads up to {VERSION}: update fewtune")
    if type(version) is not int or version < 1:
        raise DeltaError(f"{source} has an impossible version: it is damaged; get the file again")
    return header


def _said(error: Exception) -> str:
    """An exception of a library in one line."""
    text = " ".join(str(error).split())
    return f"it holds no {text}" if isinstance(error, KeyError) else text


def _checksum(content: bytes, present: str) -> str:
    """SHA-256 of the file as it was before its checksum, ``present``, was set."""
    at = content.find(present.encode())
    total = hashlib.sha256(content[:at])
    total.update(NO_CHECKSUM.encode())
    total.update(memoryview(content)[at + len(present) :])
    return total.hexdigest()


def _decode(stored: dict[str, Tensor], header: dict[str, Any]) -> Delta:
    blocks = {name: tensor.numpy().tobytes() for name, tensor in stored.items()}
    description = Description.from_bytes(blocks["model"])
    layers, views = description.layers, description.anatomy.views
    tables = unpack(blocks["tables"], description.bits[0], sum(form.hot for form in layers.values()))
    integers = unpack(blocks["places"], description.bits[1], sum(form.count for form in layers.values()))
    matrices = {name: (views[name].neurons, views[name].fan_in) for name in layers}
    places = dict(decode_all(layers, matrices, tables, integers))
    choice = Selection(description.anatomy, {n: places[n] for n in views if n in places}, description.dense)
    numbers = _numbers(description, blocks)
    return Delta(
        choice,
        values={name: numbers[name] for name in choice.places},
        whole={name: numbers[name] for name in (*choice.whole, *choice.head)},
        buffers={name: numbers[name] for name in description.buffers},
        fingerprint=Fingerprint.from_bytes(description.covered, blocks["fingerprint"]),
        metadata=as_json(header["metadata"]),
    )


def pack_numbers(numbers: Tensor) -> bytes:
    """The bits of a 1-D tensor, packed."""
    return pack(numbers.view(BITS[numbers.itemsize]).numpy(), 8 * numbers.itemsize)


def _numbers(description: Description, blocks: dict[str, bytes]) -> dict[str, Tensor]:
    """All tensors of the delta, cut from the streams of their dtypes."""
    result: dict[str, Tensor] = {}
    for kind in dict.fromkeys(description.dtypes.values()):
        dtype = DTYPES[kind]
        shapes = {name: size for name, size in description.shapes.items() if description.dtypes[name] == kind}
        counts = [prod(size) for size in shapes.values()]
        bits = unpack(blocks[f"numbers.{kind}"], 8 * dtype.itemsize, sum(counts))
        together = torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(dtype)
        parts = zip(shapes, together.split(counts), strict=True)
        result |= {name: part.view(shapes[name]) for name, part in parts}
    return result


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in the dtype of the file."""
    if tensor.dtype not in DTYPES.values():
        raise DeltaError(f"{name} is of {tensor.dtype}, which a delta file cannot hold; expected one of {list(DTYPES)}")
    if dtype is None or not tensor.is_floating_point():
        return tensor
    if dtype not in (torch.float16, torch.bfloat16):
        raise DeltaError(f"dtype={dtype}; expected torch.float16, torch.bfloat16 or None (lossless)")
    rounded = tensor.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise DeltaError(f"{name} has values beyond the range of {_name(dtype)}: save as torch.bfloat16 or lossless")
    return rounded


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
