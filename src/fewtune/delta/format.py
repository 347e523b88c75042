"""A delta as bytes: one safetensors file.

Tensors in the file:

* ``whole.NAME``, ``buffer.NAME``: the tensors trained whole (biases, scales, head) and changed buffers, as they are.
* ``values.DTYPE``: the bits of the new values of all selected connections of weights of that dtype, in the order of the
  layers and of their places, packed (see `packing`).
* ``tables``, ``places``: the hot columns of the layers and one integer a connection, packed.
* ``model``: zlib-compressed JSON: the backbone's anatomy, what is trained whole, how each layer is packed, what the
  fingerprint covers. ``fingerprint``: its hashes.

The header's only entry, ``fewtune``, is JSON: format, version, checksum (SHA-256 of the whole file with the
checksum's own 64 characters set to zero), dtype, number of connections, metadata. Nothing in a file is ever
executed, every length is checked against the bytes that are there before it is used, and what does not agree is
refused.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fewtune.delta.checks import check_contents
from fewtune.delta.fingerprint import Covered, Fingerprint
from fewtune.delta.packing import Layout, decode_all, encode_all, pack, unpack
from fewtune.delta.task import Delta
from fewtune.errors import DeltaError, FewtuneError
from fewtune.files import write_bytes
from fewtune.neurons import Anatomy, Role
from fewtune.selection import Selection

FORMAT = "fewtune-delta"
VERSION = 1
NO_CHECKSUM = "0" * 64
HEADER_LIMIT = 64 * 2**20
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def to_bytes(delta: Delta, dtype: torch.dtype | None = None) -> bytes:
    """The file's bytes; the same delta always gives the same. ``dtype``: as in `Delta.save`."""
    from fewtune.delta.taking import as_json

    choice = delta.choice
    layouts, tables, numbers = encode_all(choice.places)
    values = {name: _rounded(name, delta.values[name], dtype) for name in layouts}
    model = {
        "anatomy": choice.anatomy.to_json(),
        "dense": {role.value: list(names) for role, names in choice.dense.items()},
        "layers": {n: [form.count, form.hot, form.gaps, _name(values[n].dtype)] for n, form in layouts.items()},
        "widths": [tables.dtype.itemsize, numbers.dtype.itemsize],
        "covered": {n: [list(c.shape), c.floating] for n, c in delta.fingerprint.tensors.items()},
    }
    tensors = {
        "model": zlib.compress(json.dumps(model).encode(), 9),
        "tables": pack(tables),
        "places": pack(numbers),
        "fingerprint": delta.fingerprint.to_bytes(),
    }
    for kind in dict.fromkeys(_name(v.dtype) for v in values.values()):
        together = torch.cat([v for v in values.values() if _name(v.dtype) == kind])
        tensors[f"values.{kind}"] = pack(together.view(BITS[together.itemsize]).numpy())
    stored = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in tensors.items()}
    for prefix, group in {"whole": delta.whole, "buffer": delta.buffers}.items():
        stored |= {f"{prefix}.{name}": _rounded(name, tensor, dtype) for name, tensor in group.items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": NO_CHECKSUM,
        "dtype": "as trained" if dtype is None else _name(dtype),
        "connections": choice.connections,
        "metadata": as_json(delta.metadata),
    }
    content = safetensors.torch.save(stored, {"fewtune": json.dumps(header)})
    checksum = _checksum(content, NO_CHECKSUM)
    assert checksum is not None
    return content.replace(NO_CHECKSUM.encode(), checksum.encode(), 1)


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
        content = path.read_bytes()
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
    try:
        header = _header(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DeltaError(f"{source} is not a delta file, or its beginning is damaged ({error})") from error
    if header["format"] != FORMAT:
        raise DeltaError(f"{source} is a {str(header['format'])[:80]} file; expected a {FORMAT}")
    version = header.get("version")
    if isinstance(version, int) and version > VERSION:
        raise DeltaError(f"{source} has version {version}; this fewtune reads up to {VERSION}: update fewtune")
    if version != VERSION or header.get("checksum") != _checksum(content, header.get("checksum")):
        raise DeltaError(f"{source} is truncated or altered: its checksum does not agree; get the file again")
    try:
        delta = _decode(safetensors.torch.load(content), header)
        check_contents(delta)
    except (
        SafetensorError,
        FewtuneError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
        ZeroDivisionError,
        RuntimeError,
        zlib.error,
    ) as error:
        raise DeltaError(f"{source} is damaged: {error}") from error
    return delta


def _header(content: bytes) -> dict[str, Any]:
    """What the file says of itself in its safetensors header."""
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= min(HEADER_LIMIT, len(content) - 8):
        raise ValueError("no safetensors header")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fewtune"])
    if not isinstance(header, dict) or not isinstance(header["format"], str):
        raise ValueError("no format is named")
    return header


def _checksum(content: bytes, present: Any) -> str | None:
    """SHA-256 of the file as it was before its checksum was set."""
    if not isinstance(present, str) or len(present) != 64 or not present.isascii():
        return None
    at = content.find(present.encode())
    total = hashlib.sha256(content[:at])
    total.update(NO_CHECKSUM.encode())
    total.update(memoryview(content)[at + 64 :])
    return total.hexdigest()


def _decode(stored: dict[str, Tensor], header: dict[str, Any]) -> Delta:
    blocks = {n: t.numpy().tobytes() for n, t in stored.items() if t.dtype is torch.uint8 and t.ndim == 1}
    model = json.loads(_inflate(blocks["model"]))
    anatomy = Anatomy.from_json(model["anatomy"])
    layers = {n: Layout(int(count), int(hot), gaps is True) for n, (count, hot, gaps, _) in model["layers"].items()}
    if any(layout.count < 1 or layout.hot < 0 for layout in layers.values()):
        raise ValueError("a layer has a negative length")
    totals = sum(form.hot for form in layers.values()), sum(form.count for form in layers.values())
    tables, numbers = (
        unpack(blocks[block], width, total)
        for block, width, total in zip(("tables", "places"), model["widths"], totals, strict=True)
    )
    matrices = {n: (anatomy.views[n].neurons, anatomy.views[n].fan_in) for n in layers}
    places = dict(decode_all(layers, matrices, tables, numbers))
    dense = {Role(role): tuple(names) for role, names in model["dense"].items()}
    return Delta(
        Selection(anatomy, places, dense),
        _values({n: (layers[n].count, kind) for n, (_, _, _, kind) in model["layers"].items()}, blocks),
        {n.removeprefix("whole."): t for n, t in stored.items() if n.startswith("whole.")},
        {n.removeprefix("buffer."): t for n, t in stored.items() if n.startswith("buffer.")},
        Fingerprint.from_bytes(
            {n: Covered(tuple(shape), floating) for n, (shape, floating) in model["covered"].items()},
            blocks["fingerprint"],
        ),
        header["metadata"],
    )


def _values(layers: dict[str, tuple[int, str]], blocks: dict[str, bytes]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for kind in dict.fromkeys(kind for _, kind in layers.values()):
        names = [n for n, (_, k) in layers.items() if k == kind]
        counts = [layers[n][0] for n in names]
        bits = unpack(blocks[f"values.{kind}"], DTYPES[kind], sum(counts)).view(f"<i{DTYPES[kind]}")
        together = torch.from_numpy(bits).view(getattr(torch, kind))
        values |= dict(zip(names, together.split(counts), strict=True))
    return {name: values[name] for name in layers}


def _inflate(data: bytes) -> bytes:
    decoder = zlib.decompressobj()
    content = decoder.decompress(data, HEADER_LIMIT)
    if not decoder.eof:
        raise ValueError("the description of the model is damaged")
    return content


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in the dtype of the file."""
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
