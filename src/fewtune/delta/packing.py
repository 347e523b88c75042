"""Compact encoding of indices and values: integers in byte planes, places in hot columns or as gaps.

A layer's places become integers in whichever of four ways is the shortest. *Positions*: every neuron has the
same number of connections, and each is written as its column. *Gaps*: the distances between consecutive places
of the matrix read row by row. Both are counted either in the layer's own columns or in its hot columns, the
distinct columns that the selection touches, which are then listed once in a table. Integers, and the bits of
the values, are split into planes (all first bytes, all second bytes, ...) and each plane is Huffman coded where
that is shorter.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fewtune.neurons import Places

MATRIX_LIMIT = 2**48
"""Largest number of entries of a matrix; keeps all arithmetic on indices within 64 bits."""


def squeeze(data: bytes, coded: bool = True) -> bytes:
    """Huffman coded (run lengths too), with a leading 1; or as it is, with a leading 0, where that is not longer.

    ``coded``: False leaves it as it is.
    """
    if not coded:
        return b"\0" + data
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    shorter = coder.compress(data) + coder.flush()
    return b"\1" + shorter if len(shorter) < len(data) else b"\0" + data


def expand(data: bytes, length: int) -> bytes:
    """The inverse of `squeeze`; never allocates more than ``length`` bytes.

    Raises:
        ValueError: the data is damaged or does not have that length.
    """
    plain = data[1:]
    if data[:1] == b"\1":
        decoder = zlib.decompressobj(-15)
        try:
            # Room for one byte too many shows data that is too long; zlib takes 0 for "no limit", so never less than 1.
            plain = decoder.decompress(data[1:], length + 1)
        except zlib.error as error:
            raise ValueError(f"a packed block is damaged ({error})") from error
        if not decoder.eof or decoder.unused_data:
            raise ValueError("a packed block has another length than stated")
    elif data[:1] != b"\0":
        raise ValueError("a packed block has an unknown coding")
    if len(plain) != length:
        raise ValueError("a packed block has another length than stated")
    return plain


def pack(numbers: np.ndarray, bits: int, coded: bool = True) -> bytes:
    """Unsigned integers below 2**bits as squeezed planes: for each, its length in 8 bytes and its data."""
    blocks = [squeeze(plane.tobytes(), coded) for plane in _planes(numbers, bits)]
    return b"".join(len(block).to_bytes(8, "little") + block for block in blocks)


def unpack(data: bytes, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack`: ``count`` integers, of the smallest unsigned type.

    Raises:
        ValueError: the data is damaged.
    """
    if not 1 <= bits <= 64 or count < 0:
        raise ValueError(f"{count} integers of {bits} bits")
    planes, start = [], 0
    for _ in range(_plane_bits(bits)[0]):
        length = int.from_bytes(data[start : start + 8], "little")
        planes.append(np.frombuffer(expand(data[start + 8 : start + 8 + length], count), np.uint8))
        start += 8 + length
    if start != len(data):
        raise ValueError("a packed block has another length than stated")
    numbers = np.zeros(count, _unsigned(bits))
    for i, plane in enumerate(planes):
        numbers |= plane.astype(numbers.dtype) << numbers.dtype.type(i * _plane_bits(bits)[1])
    return numbers


def bit_length(numbers: np.ndarray) -> int:
    """Bits that the largest of some non-negative integers needs, at least one."""
    return max(1, int(numbers.max()).bit_length()) if numbers.size else 1


def _plane_bits(bits: int) -> tuple[int, int]:
    """Number of planes, and bits in each: as few planes of at most a byte as there can be, all alike.

    Ten bits are two planes of five, not one of eight and one of two: an alphabet of four is Huffman coded badly.
    """
    planes = -(-bits // 8)
    return planes, -(-bits // planes)


def _planes(numbers: np.ndarray, bits: int) -> list[np.ndarray]:
    """The planes of some integers, the lowest bits first."""
    planes, each = _plane_bits(bits)
    numbers = numbers.astype(_unsigned(bits))
    kind = numbers.dtype.type
    return [((numbers >> kind(i * each)) & kind(2**each - 1)).astype(np.uint8) for i in range(planes)]


def _unsigned(bits: int) -> np.dtype:
    return np.dtype(next(f"<u{size}" for size in (1, 2, 4, 8) if bits <= 8 * size))


@dataclass(frozen=True)
class Layout:
    """How one layer's places are written: their number, the hot columns listed (0: none), gaps or positions."""

    count: int
    hot: int
    gaps: bool


def encode(places: Places) -> tuple[Layout, np.ndarray, np.ndarray]:
    """The shortest way to write a layer's places: its layout, its table of hot columns, one integer a connection."""
    rows, columns = places.rows.numpy(), places.columns.numpy()
    table, numbers, times = np.unique(columns, return_inverse=True, return_counts=True)
    none = np.empty(0, np.int64)
    forms = [
        (Layout(len(places), 0, True), none, _gaps(rows, columns, places.fan_in)),
        (Layout(len(places), len(table), True), table, _gaps(rows, numbers, len(table))),
    ]
    if places.k is not None:
        # The most frequent column first, so that small numbers are frequent in every layer and share one Huffman code.
        order = np.argsort(-times, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        forms.append((Layout(len(places), 0, False), none, columns))
        forms.append((Layout(len(places), len(table), False), table[order], rank[numbers]))
    return min(forms, key=lambda form: _bits(form[1]) + _bits(form[2]))


def decode(layout: Layout, neurons: int, fan_in: int, table: np.ndarray, numbers: np.ndarray) -> Places:
    """The inverse of `encode`.

    Raises:
        ValueError: a place is out of range, out of order or there twice.
    """
    if (len(table), len(numbers)) != (layout.hot, layout.count):
        raise ValueError("a layer has another number of places than stated")
    width = layout.hot or fan_in
    if min(neurons, fan_in) < 1 or neurons * fan_in > MATRIX_LIMIT or width > fan_in:
        raise ValueError(f"a matrix of {neurons} x {fan_in} with {layout.hot} hot columns")
    if layout.hot and int(table.max()) >= fan_in:
        raise ValueError("a hot column is out of range")
    if not numbers.size or int(numbers.max()) >= neurons * width:
        raise ValueError("a place is out of range")
    numbers = numbers.astype(np.int64)
    if layout.gaps:
        place = np.cumsum(numbers + 1) - 1
        rows, within = place // width, place % width
    else:
        each, rest = divmod(len(numbers), neurons)
        if rest or int(numbers.max()) >= width:
            raise ValueError("a place is out of range")
        rows, within = np.repeat(np.arange(neurons), each), numbers
    flat = rows * fan_in + (table.astype(np.int64)[within] if layout.hot else within)
    if flat[0] < 0 or flat[-1] >= neurons * fan_in or not (np.diff(flat) > 0).all():
        raise ValueError("places are out of order or range")
    return Places(neurons, fan_in, torch.from_numpy(flat))


def encode_all(places: Mapping[str, Places]) -> tuple[dict[str, Layout], np.ndarray, np.ndarray]:
    """The layout of every layer, and all tables and all integers.

    Layers of equal width stand together, since like integers share a Huffman code well.
    """
    encoded = {n: encode(places[n]) for n in sorted(places, key=lambda n: places[n].fan_in)}
    none = np.empty(0, np.int64)  # a task may change no connection, only biases or a head
    tables = np.concatenate([none, *(table for _, table, _ in encoded.values())])
    numbers = np.concatenate([none, *(integers for _, _, integers in encoded.values())])
    return {name: layout for name, (layout, _, _) in encoded.items()}, tables, numbers


def decode_all(
    layouts: Mapping[str, Layout],
    matrices: Mapping[str, tuple[int, int]],
    tables: np.ndarray,
    numbers: np.ndarray,
) -> Iterator[tuple[str, Places]]:
    """The inverse of `encode_all`; ``matrices``: (neurons, fan_in) of each layer."""
    hot = entry = 0
    for name, layout in layouts.items():
        table, integers = tables[hot : hot + layout.hot], numbers[entry : entry + layout.count]
        yield name, decode(layout, *matrices[name], table, integers)
        hot, entry = hot + layout.hot, entry + layout.count


def _gaps(rows: np.ndarray, numbers: np.ndarray, width: int) -> np.ndarray:
    """The entries skipped before each place: zero or more, and the places are in order by construction."""
    return np.diff(rows * width + numbers, prepend=-1) - 1


def _bits(numbers: np.ndarray) -> float:
    """About as many bits as the planes take: the sum of their entropies."""
    if not numbers.size:
        return 0.0
    bits = 0.0
    for plane in _planes(numbers, bit_length(numbers)):
        counts = np.bincount(plane)
        share = counts[counts > 0] / numbers.size
        bits -= numbers.size * float((share * np.log2(share)).sum())
    return bits
