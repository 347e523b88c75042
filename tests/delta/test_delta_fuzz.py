"""Altered delta files by the thousand: each is refused with a DeltaError or is a delta, and never anything else.

``FEWTUNE_FUZZ=N`` sets the number of altered files (default: 10,000), ``FEWTUNE_FUZZ_SEED`` another seed. A quarter of
them are plain damage. The others carry a right checksum, so that they reach the deeper checks.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from delta_cases import Small, Task, anatomy_of, bits, choose, made_up
from fewtune.delta import Delta, applied
from fewtune.delta.delta import from_bytes
from fewtune.delta.format import NO_CHECKSUM, _checksum, pack_numbers, to_bytes
from fewtune.delta.packing import pack, squeeze
from fewtune.errors import DeltaError

FILES = int(os.environ.get("FEWTUNE_FUZZ", "10000"))
SEED = int(os.environ.get("FEWTUNE_FUZZ_SEED", "0"))
STRANGE = [
    None, True, False, 0, 1, -1, 2, 7, 255, 10**12, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, 1.0, -0.0, 1e308,
    float("nan"), float("inf"), "", "x", "rows", "columns", "transposed", "head", "bias", "float16", "float64", "int64",
    "bool", "conv.weight", "linear.bias", [], {}, [[]], [0], [1, 2, 3], [10**12, 10**12], ["head.weight"], {"a": 1},
    "__import__('os').system('false')", "\x00", "é" * 40,
]  # fmt: skip


# ---- parts of a file ----------------------------------------------------------------------------------------------


def split(content: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """The safetensors header, our header in it, and the blocks."""
    length = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + length])
    body = content[8 + length :]
    blocks = {name: body[slice(*entry["data_offsets"])] for name, entry in outer.items() if name != "__metadata__"}
    return outer, json.loads(outer["__metadata__"]["fewtune"]), blocks


def join(ours: Any, blocks: dict[str, bytes], entries: dict[str, Any] | None = None) -> bytes:
    """A safetensors file, sealed with its right checksum; ``entries``: what its header says of its tensors instead."""
    header: dict[str, Any] = {"__metadata__": {"fewtune": json.dumps(ours)}}
    text = json.dumps(header | (entries_of(blocks) if entries is None else entries)).encode()
    text += b" " * (-len(text) % 8)
    return seal(len(text).to_bytes(8, "little") + text + b"".join(blocks.values()))


def entries_of(blocks: dict[str, bytes]) -> dict[str, Any]:
    entries, start = {}, 0
    for name, block in blocks.items():
        entries[name] = {"dtype": "U8", "shape": [len(block)], "data_offsets": [start, start + len(block)]}
        start += len(block)
    return entries


def seal(content: bytes) -> bytes:
    """The same file with the checksum that it should have, where its place can still be found."""
    start = content.find(b'checksum\\": \\"')
    if start < 0:
        return content
    at = start + len(b'checksum\\": \\"')
    content = content[:at] + NO_CHECKSUM.encode() + content[at + 64 :]
    return content.replace(NO_CHECKSUM.encode(), _checksum(content, NO_CHECKSUM).encode(), 1)


# ---- alterations --------------------------------------------------------------------------------------------------


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def insert(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.randbytes(draw.choice([1, 2, 8, 100])) + content[at:]


def remove(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + content[at + draw.choice([1, 2, 8, 100]) :]


def swap_chunks(content: bytes, draw: random.Random) -> bytes:
    size = draw.choice([1, 8, 64])
    one, two = sorted(draw.randrange(len(content) - size) for _ in range(2))
    two = max(two, one + size)
    moved = content[:one] + content[two : two + size] + content[one + size : two] + content[one : one + size]
    return moved + content[two + size :]


def edit_header_text(content: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    at = 8 + draw.randrange(length)
    return content[:at] + draw.choice(b'{}[]":,0123456789eE.-\\ntx \xff\x00').to_bytes(1, "little") + content[at + 1 :]


def edit_length(content: bytes, draw: random.Random) -> bytes:
    length = draw.choice([0, 1, 2, 2**63, 2**64 - 1, 10**12, len(content), len(content) - 8, draw.randrange(5000)])
    return length.to_bytes(8, "little") + content[8:]


PLAIN: list[Callable[[bytes, random.Random], bytes]] = [
    flip_bits, truncate, insert, remove, swap_chunks, edit_header_text, edit_length,
]  # fmt: skip


def mutate_json(value: Any, draw: random.Random) -> Any:
    """The same JSON with one thing in it replaced, removed, added, or renamed."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.1:
        if type(value) is int and draw.random() < 0.5:
            return value + draw.choice([-1, 1, 10**12])
        return draw.choice(STRANGE)
    if isinstance(value, dict):
        changed, key = dict(value), draw.choice(list(value))
        match draw.randrange(10):
            case 0:
                del changed[key]
            case 1:
                changed[str(draw.choice(STRANGE))] = changed.pop(key)
            case 2:
                changed[str(draw.choice(STRANGE))] = draw.choice(STRANGE)
            case 3:
                changed[key] = value[draw.choice(list(value))]
            case _:
                changed[key] = mutate_json(value[key], draw)
        return changed
    listed, at = list(value), draw.randrange(len(value))
    match draw.randrange(6):
        case 0:
            del listed[at]
        case 1:
            listed.insert(at, draw.choice(STRANGE))
        case 2:
            draw.shuffle(listed)
        case _:
            listed[at] = mutate_json(value[at], draw)
    return listed


def forge_header(content: bytes, draw: random.Random) -> bytes:
    _, ours, blocks = split(content)
    return join(mutate_json(ours, draw), blocks)


def forge_tensors(content: bytes, draw: random.Random) -> bytes:
    _, ours, blocks = split(content)
    entries: Any = entries_of(blocks)
    if draw.random() < 0.3:
        entries[draw.choice(list(entries))]["dtype"] = draw.choice(
            ["F32", "BF16", "I8", "F8_E4M3", "BOOL", "U16", "C64", "nonsense"]
        )
    else:
        entries = mutate_json(entries, draw)
    return join(ours, blocks, entries if isinstance(entries, dict) else {"model": entries})


def forge_description(content: bytes, draw: random.Random) -> bytes:
    _, ours, blocks = split(content)
    model = json.loads(zlib.decompress(blocks["model"]))
    for _ in range(draw.choice([1, 1, 2])):
        model = mutate_json(model, draw)
    return join(ours, blocks | {"model": zlib.compress(json.dumps(model).encode())})


def forge_block(content: bytes, draw: random.Random) -> bytes:
    """One block damaged, or exchanged with another, or left out."""
    _, ours, blocks = split(content)
    name = draw.choice(list(blocks))
    match draw.randrange(4):
        case 0:
            del blocks[name]
        case 1:
            blocks[name] = blocks[draw.choice(list(blocks))]
        case _:
            blocks[name] = draw.choice(PLAIN)(blocks[name] + b"\0" * 65, draw)
    return join(ours, blocks)


def forge_places(content: bytes, draw: random.Random) -> bytes:
    """Well-packed integers, but others."""
    _, ours, blocks = split(content)
    model = json.loads(zlib.decompress(blocks["model"]))
    count, width = sum(form[0] for form in model["layers"].values()), model["bits"][1]
    integers = np.array([draw.randrange(2**width) for _ in range(count)], dtype=np.uint64)
    if draw.random() < 0.5:  # mostly small, so that some of them are possible places
        integers %= np.uint64(draw.choice([1, 2, 3, 5]))
    return join(ours, blocks | {"places": pack(integers, width)})


def forge_numbers(content: bytes, draw: random.Random) -> bytes:
    """Well-packed values, but others: NaN, infinite, or any bits."""
    _, ours, blocks = split(content)
    delta = from_bytes(content)
    count = sum(
        t.numel()
        for t in (*delta.values.values(), *delta.whole.values(), *delta.buffers.values())
        if t.dtype is torch.float32
    )
    values = np.frombuffer(draw.randbytes(4 * count), np.float32).copy()
    if draw.random() < 0.8:
        values = np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=-1.0)
        if draw.random() < 0.5:
            values[draw.randrange(count)] = draw.choice([np.nan, np.inf, -np.inf])
    return join(ours, blocks | {"numbers.float32": pack(values.view(np.uint32), 32)})


@cache
def zeros(count: int) -> bytes:
    """Packed zeros: about a thousandth of their number in bytes."""
    return squeeze(bytes(count))


def bomb(content: bytes, count: int, where: str) -> bytes:
    """A small file of a right checksum that states, in agreement with itself, ``count`` numbers, and packs them.

    ``where``: "places" are those of one layer's connections, "whole" are a bias of that many numbers, "buffers" are
    running statistics.
    """
    _, ours, blocks = split(content)
    model = json.loads(zlib.decompress(blocks["model"]))
    anatomy, layers = model["anatomy"], model["layers"]
    match where:
        case "places":
            name = list(layers)[-1]
            anatomy["shapes"][name], anatomy["views"][name] = [1, count], [[1, count], "rows", 1]
            layers[name] = [count, 0, True]
        case "whole":
            anatomy["shapes"]["linear.bias"] = [count]
        case _:
            name = next(iter(model["buffers"]))
            model["buffers"][name] = [count]
            model["known buffers"][name] = [[count], True]
    whole = {name for names in model["dense"].values() for name in names} | {"head.weight", "head.bias"}
    places = sum(form[0] for form in layers.values())
    floats = places + sum(prod(anatomy["shapes"][name]) for name in whole)
    floats += sum(prod(size) for name, size in model["buffers"].items() if "tracked" not in name)
    if where == "places":
        model["bits"][1] = 1
        blocks["places"] = planes(1, places)
    blocks["numbers.float32"] = planes(4, floats)
    return join(ours, blocks | {"model": zlib.compress(json.dumps(model).encode())})


def planes(number: int, length: int) -> bytes:
    """A block of so many planes of zeros."""
    return (len(zeros(length)).to_bytes(8, "little") + zeros(length)) * number


def forge_bomb(content: bytes, draw: random.Random) -> bytes:
    """Sizes that agree with each other and with what is packed, but are far beyond the file's own."""
    model = json.loads(zlib.decompress(split(content)[2]["model"]))
    where = draw.choice(["places", "whole", "buffers"] if model["buffers"] else ["places", "whole"])
    return bomb(content, draw.choice([2**22, 2**24, 2**25 + 1]), where)


FORGED: list[Callable[[bytes, random.Random], bytes]] = [
    lambda content, draw: seal(draw.choice(PLAIN)(content, draw)),
    forge_header, forge_tensors, forge_description, forge_description, forge_block, forge_bomb, forge_places,
    forge_numbers,
]  # fmt: skip


# ---- the test -----------------------------------------------------------------------------------------------------


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fails where anything is compiled, unpickled, started, opened or connected."""
    events = {"compile", "pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "open", "socket.connect"}
    seen: list[str] = []
    watching = True

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if watching and event in events:
            seen.append(event)

    sys.addaudithook(hook)
    try:
        yield
    finally:
        watching = False
    assert not seen, Counter(seen)


def one_line(error: DeltaError) -> None:
    assert "\n" not in str(error), error


def fingerprint(model: nn.Module) -> list[bytes]:
    return [bits(t) for t in (*model.parameters(), *model.buffers())]


def try_out(delta: Delta, model: nn.Module, before: list[bytes]) -> str:
    """Applies what could be loaded: it goes in and comes out again without a trace, or is refused without a trace."""
    result = "refused by apply"
    try:
        delta.apply(model)
    except DeltaError as error:
        one_line(error)
    else:
        delta.revert(model)
        result = "applied"
    assert applied(model) is None
    assert fingerprint(model) == before
    return result


@pytest.fixture(scope="module")
def bases() -> list[tuple[nn.Module, Task]]:
    """Deltas of all kinds: uniform, ragged, few, with buffers, in half precision."""
    got = []
    for how, dtype, buffers in (
        (1, torch.float32, True),
        ("ragged", torch.float32, False),
        ("one", torch.bfloat16, False),
    ):
        model = Small().to(dtype)
        got.append((model, made_up(model, choose(anatomy_of(model), how), buffers=buffers, metadata={"a": [1]})))
    return got


def test_altered_files(bases: list[tuple[nn.Module, Task]]) -> None:
    draw, results = random.Random(SEED), Counter[str]()
    files = [(model, to_bytes(task.delta), fingerprint(model)) for model, task in bases]
    for model, content, before in files:  # warm: imports and caches are none of the altered files' doing
        try_out(from_bytes(content), model, before)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with nothing_runs():
        for i in range(FILES):
            model, content, before = files[i % 2 if i % 10 else 2]
            plain = draw.random() < 0.25
            # Numbers of two bytes have a stream of their own; the forger of numbers knows that of four.
            ways = PLAIN if plain else FORGED[: len(FORGED) - (model is files[2][0])]
            altered = draw.choice(ways)(content, draw)
            if altered == content:
                results["unaltered"] += 1
                continue
            try:
                delta = from_bytes(altered)
            except DeltaError as error:
                one_line(error)
                results["refused by load"] += 1
            else:
                assert not plain, "damage that the checksum does not notice"
                results[try_out(delta, model, before)] += 1
    assert sum(results.values()) == FILES
    # Forged with the right checksum, some are sound deltas after all: the other branches were reached too.
    assert all(results[kind] > FILES // 1000 for kind in ("refused by load", "refused by apply", "applied")), results
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
    assert grown < 200_000, f"{grown} KiB more memory"
    assert all(fingerprint(model) == before for model, _, before in files)


def test_claims_of_huge_sizes_allocate_nothing(bases: list[tuple[nn.Module, Task]]) -> None:
    content = to_bytes(bases[0][1].delta)
    _, ours, blocks = split(content)
    model = json.loads(zlib.decompress(blocks["model"]))

    def described(path: list[str | int], value: object) -> bytes:
        forged = json.loads(json.dumps(model))
        place = forged
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        return join(ours, blocks | {"model": zlib.compress(json.dumps(forged).encode())})

    huge = 10**12
    claims = [
        described(["anatomy", "shapes", "linear.bias"], [huge]),
        described(["anatomy", "shapes", "linear.bias"], [huge, huge, huge]),
        described(["buffers", "batch_norm.running_mean"], [huge]),
        described(["layers", "linear.weight", 0], huge),
        described(["layers", "linear.weight", 1], huge),
        described(["layers", "linear.weight"], [huge, huge, True]),
        described(["anatomy", "views", "linear.weight", 0], [huge, 9]),
        join(
            ours, blocks, entries_of(blocks) | {"places": {"dtype": "U8", "shape": [huge], "data_offsets": [0, huge]}}
        ),
        join(ours, blocks | {"model": zlib.compress(b" " * 50_000_000)}),
        join(ours, blocks | {"places": (9).to_bytes(8, "little") + b"\1" + b"\0" * 8}),
        (huge).to_bytes(8, "little") + content[8:],
    ]
    for claim in claims:
        tracemalloc.start()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DeltaError):
            from_bytes(claim)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
        tracemalloc.stop()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 100_000


@pytest.mark.parametrize("where", ["places", "whole", "buffers"])
def test_small_files_that_expand_are_refused_before_they_do(bases: list[tuple[nn.Module, Task]], where: str) -> None:
    """80 million numbers in some hundred kilobytes, sealed, and everything stated agrees."""
    file = bomb(to_bytes(bases[0][1].delta), 80_000_000, where)
    assert len(file) < 500_000
    tracemalloc.start()
    with pytest.raises(DeltaError, match=r"states [\d,]+ bytes of numbers, and [\d,]+ are the most .* limit="):
        from_bytes(file)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_packed_json_that_expands_is_refused(bases: list[tuple[nn.Module, Task]]) -> None:
    _, ours, blocks = split(to_bytes(bases[0][1].delta))
    model = json.loads(zlib.decompress(blocks["model"])) | {"more": [[]] * 4_000_000}
    file = join(ours, blocks | {"model": zlib.compress(json.dumps(model).encode())})
    assert len(file) < 100_000
    tracemalloc.start()
    with pytest.raises(DeltaError, match="is damaged"):
        from_bytes(file)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_what_shrinks_very_much_is_still_read() -> None:
    """A large head of zeros is stored as it is, so that it is read; where an older file coded it, a limit reads it."""
    model = Small(classes=80_000)
    delta = made_up(model, choose(anatomy_of(model), 1)).delta
    delta.whole["head.weight"].zero_()
    content = to_bytes(delta)
    assert from_bytes(content) == delta
    _, ours, blocks = split(content)
    order = json.loads(zlib.decompress(blocks["model"]))["layers"]
    numbers = torch.cat([delta.new(name).reshape(-1) for name in (*order, *delta.whole)])
    older = join(ours, blocks | {"numbers.float32": pack_numbers(numbers)})
    with pytest.raises(DeltaError, match="limit=") as refusal:
        from_bytes(older)
    limit = int(str(refusal.value).partition("limit=")[2].rstrip(")"))
    assert from_bytes(older, limit=limit) == delta


def test_deep_and_endless_json(bases: list[tuple[nn.Module, Task]]) -> None:
    _, ours, blocks = split(to_bytes(bases[0][1].delta))
    deep = b"[" * 100_000 + b"]" * 100_000
    for text in (deep, b"1" * 10_000, b'{"anatomy":' * 50_000, b"NaN", b"\xff\xfe"):
        with pytest.raises(DeltaError, match="damaged"):
            from_bytes(join(ours, blocks | {"model": zlib.compress(text)}))
        header = b'{"__metadata__":{"fewtune":' + text + b"}}"
        with pytest.raises(DeltaError, match="not a delta file"):
            from_bytes(len(header).to_bytes(8, "little") + header)


def test_unaltered_file_is_what_the_forger_would_write(bases: list[tuple[nn.Module, Task]]) -> None:
    """The forger's own seal is right: what it takes apart and joins again loads as before."""
    for _, task in bases:
        _, ours, blocks = split(to_bytes(task.delta))
        assert from_bytes(join(ours, blocks)) == task.delta
