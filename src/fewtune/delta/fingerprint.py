"""How a delta recognises its backbone.

A fingerprint holds hashes of the backbone's original tensors, the head aside. Two depths: ``fast`` reads the
places that the delta overwrites, every frozen vector, and a fixed-stride sample of all other tensors; ``full``
reads everything. Two roundings: a backbone in float32 is often run in bfloat16 or float16, and each cast rounds
in its own way, so that no one rounding fits all three. Each depth is hashed once with all numbers rounded to
bfloat16 and once to float16, and a backbone is known when either hash agrees: the float32 original, its
bfloat16 cast and its float16 cast all pass, and so does the float32 original where the delta was taken from a
cast. (A delta taken in bfloat16 is refused on a float16 cast of the float32 original, and the other way round:
two roundings then stand between them.)

Of a quantised weight the numbers are those that it stands for.

Beside each hash stand two bytes a tensor, from which an error names the first tensor that differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from fewtune.delta.entries import read
from fewtune.quantised import dequantised, logical_shape, scheme

Depth = Literal["fast", "full"]
DEPTHS: Final[tuple[Depth, ...]] = ("fast", "full")
ROUNDINGS: Final = (torch.bfloat16, torch.float16)
DIGEST, TAG = 32, 2
SAMPLE = 512
SMALL = 4096


class Covered(NamedTuple):
    """What a fingerprint says in clear of a tensor: its shape, and whether its numbers are floating-point."""

    shape: tuple[int, ...]
    floating: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Covered:
        """Of a quantised weight, what is said of the numbers that it stands for."""
        return cls(logical_shape(tensor), tensor.is_floating_point() or scheme(tensor) is not None)


def fast_positions(
    tensors: Mapping[str, Covered], overwritten: Mapping[str, Tensor | None]
) -> dict[str, Tensor | None]:
    """Flat positions of each covered tensor that the fast depth reads; None: all.

    ``overwritten``: those that the delta overwrites, of the tensors that it touches (None: all).
    """
    positions: dict[str, Tensor | None] = {}
    for name, (shape, _) in tensors.items():
        index, numel = overwritten.get(name), prod(shape)
        if len(shape) <= 1 or numel <= SMALL or (name in overwritten and index is None):
            positions[name] = None
        else:
            # An odd stride does not keep to a few columns of a matrix whose width is a power of two.
            sample = torch.arange(0, numel, numel // SAMPLE | 1)
            positions[name] = sample if index is None else torch.cat([index, sample])
    return positions


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of a backbone.

    ``tensors``: the tensors covered, in order. ``hashes``: [2 depths][2 roundings] of (digest, tags).
    """

    tensors: Mapping[str, Covered]
    hashes: tuple[tuple[tuple[bytes, bytes], ...], ...]

    @classmethod
    def of(
        cls,
        originals: Iterable[tuple[str, Tensor]],
        tensors: Mapping[str, Covered],
        overwritten: Mapping[str, Tensor | None],
    ) -> Fingerprint:
        """Of the original tensors, in the order of ``tensors``, each looked at once."""
        positions = fast_positions(tensors, overwritten)
        digests: dict[tuple[Depth, torch.dtype], list[bytes]] = {(d, r): [] for d in DEPTHS for r in ROUNDINGS}
        for name, tensor in originals:
            index = positions[name]
            fast = tensor if index is None else read(tensor, index)
            for depth, rounding in digests:
                digests[depth, rounding] += _digests([fast if depth == "fast" else tensor], rounding)
        return cls(tensors, tuple(tuple(_combined(digests[d, r]) for r in ROUNDINGS) for d in DEPTHS))

    def first_difference(self, parts: Iterable[Tensor], depth: Depth) -> str | None:
        """The name of the first tensor that is not the backbone's, or None where all are.

        ``parts``: of each covered tensor the entries that the depth reads. They are read up to twice.
        """
        parts, names = list(parts), list(self.tensors)
        half = any(part.dtype is torch.float16 for part in parts)
        differing = []
        for rounding in reversed(ROUNDINGS) if half else ROUNDINGS:
            digest, tags = self.hashes[DEPTHS.index(depth)][ROUNDINGS.index(rounding)]
            # The fast parts are small: rounded together they take a few steps instead of hundreds.
            together = [parts] if depth == "fast" else [[part] for part in parts]
            digests = [one for group in together for one in _digests(group, rounding)]
            if hashlib.sha256(b"".join(digests)).digest() == digest:
                return None
            equal = [one[:TAG] == tags[i * TAG : (i + 1) * TAG] for i, one in enumerate(digests)]
            differing.append(equal.index(False) if False in equal else len(names) - 1)
        return names[max(differing)]  # the rounding that agrees further tells more

    def to_bytes(self) -> bytes:
        return b"".join(digest + tags for row in self.hashes for digest, tags in row)

    @classmethod
    def from_bytes(cls, tensors: Mapping[str, Covered], data: bytes) -> Fingerprint:
        """The inverse of `to_bytes`.

        Raises:
            ValueError: the length is wrong.
        """
        step = DIGEST + TAG * len(tensors)
        if len(data) != len(DEPTHS) * len(ROUNDINGS) * step:
            raise ValueError("the fingerprint has another length than stated")
        flat = [(data[i : i + DIGEST], data[i + DIGEST : i + step]) for i in range(0, len(data), step)]
        return cls(tensors, (tuple(flat[: len(ROUNDINGS)]), tuple(flat[len(ROUNDINGS) :])))


def _combined(digests: Sequence[bytes]) -> tuple[bytes, bytes]:
    """One digest over the digests of the tensors, and the beginning of each."""
    return hashlib.sha256(b"".join(digests)).digest(), b"".join(one[:TAG] for one in digests)


def _digests(tensors: Sequence[Tensor], rounding: torch.dtype) -> list[bytes]:
    """A digest of each tensor's numbers, row by row; floating-point ones are rounded first."""
    tensors = [dequantised(tensor).detach() for tensor in tensors]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    digests = [b""] * len(tensors)
    for members in groups.values():
        flat = [tensors[i].reshape(-1) for i in members]
        numbers = torch.cat(flat) if len(flat) > 1 else flat[0]
        if numbers.is_floating_point():
            # Through float32 always: so do torch's own casts from float64.
            numbers = numbers.to(torch.float32).to(rounding)
        content = numbers.cpu().contiguous().view(torch.uint8).numpy().data
        start = 0
        for i, part in zip(members, flat, strict=True):
            end = start + part.numel() * numbers.itemsize
            digests[i] = hashlib.sha256(content[start:end]).digest()
            start = end
    return digests
