"""A delta as bytes: one safetensors file of a few blocks of bytes.

* ``model``: zlib-compressed JSON: the backbone's anatomy, what is trained whole, how each layer's places are packed,
  the dtype of everything, what the fingerprint covers.
* ``fingerprint``: the backbone's hashes.
* ``tables``, ``places``: the hot columns of the layers and one integer a connection, packed (see `packing`).
* ``numbers.DTYPE``: the bits of all new numbers of that dtype, packed: of the selected connections, then of what was
  trained whole (biases, scales, head), then of buffers.

The header's only entry, ``fewtune``, is JSON: format, version, checksum (SHA-256 of the whole file with the checksum's
own 64 characters set to zero), dtype, number of connections, metadata. Nothing in a file is ever executed, every length
is checked against the bytes that are there before it is used, and what does not agree is refused. Before anything is
unpacked, the sizes that a file states are held against each other and against its own size: see `largest`.
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
from fewtune.delta.contents import Contents
from fewtune.delta.description import LIMIT, Description
from fewtune.delta.fingerprint import Fingerprint
from fewtune.delta.packing import bit_length, decode_all, encode_all, pack, unpack
from fewtune.errors import DeltaError, FewtuneError, one_line
from fewtune.files import write_bytes
from fewtune.selection import Selection

FORMAT = "fewtune-delta"
VERSION = 1
NO_CHECKSUM = "0" * 64
EXPANSION, FLOOR = 32, 16 * 2**20
"""A file's numbers take at most so many times its own bytes in memory, or so many bytes, whichever is more."""
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


def to_bytes(delta: Contents, dtype: torch.dtype | None = None) -> bytes:
    """The file's bytes; the same delta always gives the same. ``dtype``: as in `Delta.save`."""
    choice = delta.choice
    layouts, tables, integers = encode_all(choice.places)
    numbers = {n: _rounded(n, delta.new(n), dtype) for n in (*layouts, *delta.whole, *delta.buffers)}
    description = Description(
        choice.anatomy,
        choice.dense,
        layouts,
        bits=(bit_length(tables), bit_length(integers)),
        buffers={name: tuple(buffer.shape) for name, buffer in delta.buffers.items()},
        dtypes={name: _name(tensor.dtype) for name, tensor in numbers.items()},
        covered=delta.fingerprint.tensors,
        quantised=delta.quantised,
    )

    def blocks(coded: bool) -> dict[str, bytes]:
        packed = {
            "model": description.to_bytes(),
            "fingerprint": delta.fingerprint.to_bytes(),
            "tables": pack(tables, description.bits[0], coded),
            "places": pack(integers, description.bits[1], coded),
        }
        for kind in dict.fromkeys(tensor.dtype for tensor in numbers.values()):
            together = torch.cat([tensor.reshape(-1) for tensor in numbers.values() if tensor.dtype is kind])
            packed[f"numbers.{_name(kind)}"] = pack_numbers(together, coded)
        return packed

    packed = blocks(coded=True)
    if stated_bytes(description) > largest(sum(map(len, packed.values()))):
        packed = blocks(coded=False)  # such as a large head of zeros: coded, it would be refused when it is read
    stored = {name: torch.frombuffer(bytearray(block), dtype=torch.uint8) for name, block in packed.items()}
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


def largest(length: int) -> int:
    """The most bytes that the numbers of a file of this length may take in memory.

    A delta's values hardly shrink when they are packed (4 bytes to about 3.5), its places to about a tenth.
    """
    return max(FLOOR, EXPANSION * length)


def stated_bytes(description: Description) -> int:
    """Bytes that the numbers of a described delta take in memory: values and tensors, places, hot columns."""
    integers = sum(form.count + form.hot for form in description.layers.values())
    sizes = (prod(s) * DTYPES[description.dtypes[n]].itemsize for n, s in description.shapes.items())
    return 8 * integers + sum(sizes)


def write_file(path: Path, content: bytes) -> None:
    """Raises:
    DeltaError: the file cannot be written.
    """
    try:
        write_bytes(path, content)
    except OSError as error:
        raise DeltaError(f"{path} cannot be written: {error.strerror or error}") from error


def read_file(path: Path) -> bytes:
    """All bytes of a delta file.

    Raises:
        DeltaError: the file is missing, cannot be read, or is of another kind.
    """
    try:
        with path.open("rb") as file:
            content = file.read(8)
            content += file.read(min(int.from_bytes(content, "little"), LIMIT))
            _header(content, str(path))  # before all of a large file of another kind is read
            return content + file.read()
    except FileNotFoundError as error:
        raise DeltaError(f"{path} does not exist") from error
    except OSError as error:
        raise DeltaError(f"{path} cannot be read: {error.strerror or error}") from error


def contents(content: bytes, source: str, limit: int | None = None) -> Contents:
    """The inverse of `to_bytes`; ``source`` begins the error messages, ``limit`` is as in `load_delta`.

    Raises:
        DeltaError: as `load_delta`.
    """
    header = _header(content, source)
    present = header.get("checksum")
    if not isinstance(present, str) or not present.isascii() or present != _checksum(content, present):
        raise DeltaError(f"{source} is truncated or altered: its checksum does not agree; get the file again")
    try:
        delta = _decode(safetensors.torch.load(content), header, largest(len(content)) if limit is None else limit)
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
    text = one_line(error)
    return f"it holds no {text}" if isinstance(error, KeyError) else text


def _checksum(content: bytes, present: str) -> str:
    """SHA-256 of the file as it was before its checksum, ``present``, was set."""
    at = content.find(present.encode())
    total = hashlib.sha256(content[:at])
    total.update(NO_CHECKSUM.encode())
    total.update(memoryview(content)[at + len(present) :])
    return total.hexdigest()


def _decode(stored: dict[str, Tensor], header: dict[str, Any], limit: int) -> Contents:
    blocks = {name: tensor.numpy().tobytes() for name, tensor in stored.items()}
    description = Description.from_bytes(blocks["model"])
    fingerprint = Fingerprint.from_bytes(description.covered, blocks["fingerprint"])
    if (stated := stated_bytes(description)) > limit:
        raise ValueError(
            f"it states {stated:,} bytes of numbers, and {limit:,} are the most for a file of its size; where you "
            f"trust it, read it with load_delta(path, limit={stated})"
        )
    layers, views = description.layers, description.anatomy.views
    tables = unpack(blocks["tables"], description.bits[0], sum(form.hot for form in layers.values()))
    integers = unpack(blocks["places"], description.bits[1], sum(form.count for form in layers.values()))
    matrices = {name: (views[name].neurons, views[name].fan_in) for name in layers}
    places = dict(decode_all(layers, matrices, tables, integers))
    choice = Selection(description.anatomy, {n: places[n] for n in views if n in places}, description.dense)
    numbers = _numbers(description, blocks)
    return Contents(
        choice,
        values={name: numbers[name] for name in choice.places},
        whole={name: numbers[name] for name in (*choice.whole, *choice.head)},
        buffers={name: numbers[name] for name in description.buffers},
        fingerprint=fingerprint,
        metadata=as_json(header["metadata"]),
        quantised=description.quantised,
    )


def pack_numbers(numbers: Tensor, coded: bool = True) -> bytes:
    """The bits of a 1-D tensor, packed."""
    return pack(numbers.view(BITS[numbers.itemsize]).numpy(), 8 * numbers.itemsize, coded)


def _numbers(description: Description, blocks: dict[str, bytes]) -> dict[str, Tensor]:
    """All tensors of the delta, cut from the streams of their dtypes."""
    result: dict[str, Tensor] = {}
    for kind in dict.fromkeys(description.dtypes.values()):
        dtype = DTYPES[kind]
        shapes = {name: size for name, size in description.shapes.items() if description.dtypes[name] == kind}
        counts = [prod(size) for size in shapes.values()]
        bits = unpack(blocks[f"numbers.{kind}"], 8 * dtype.itemsize, sum(counts))
        together = torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(dtype)
        parts = zip(shapes, torch.split(together, counts), strict=True)
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
