"""Damage: what disks, downloads, other programs and people do to files, drawn from a number."""

from __future__ import annotations

import random
import re

_WORDS = (
    b"nan", b"inf", b"-inf", b"1e400", b"1e30", b"-1", b"0", b"4294967296", b"9223372036854775807", b"0.5",
    b"99999999999999999999", b"1_0", b"", b"\xff\xfe", b"../../x", b"/etc/passwd", b"null", b"true", b"[]",
    b"{}",
    b"*a", b"&a", b"!!python/object:os.system", b"os:system", b"http://x.y/z", b"\x00", b"\xc3\x28", b"\r\n",
)  # fmt: skip
_INTEGERS = (
    0,
    1,
    127,
    255,
    1 << 15,
    (1 << 16) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
)


def mutate(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """``content`` with one to four kinds of damage; ``others`` are files whose parts may come in."""
    made = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        made = draw.choice(_KINDS)(made, draw, others)
    return bytes(made)


def _place(made: bytearray, draw: random.Random) -> int:
    """Somewhere; half of the time near the beginning, where headers are."""
    end = len(made) if draw.random() < 0.5 else min(len(made), 256)
    return draw.randrange(end) if end else 0


def _flip(made: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    for _count in range(draw.choice((1, 1, 8))):
        if made:
            made[_place(made, draw)] ^= 1 << draw.randrange(8)
    return made


def _byte(made: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    if made:
        made[_place(made, draw)] = draw.choice((0, 255, draw.randrange(256)))
    return made


def _integer(made: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    width, at = draw.choice((1, 2, 4, 8)), _place(made, draw)
    order = draw.choice(("little", "little", "big"))
    value = draw.choice(_INTEGERS) % (1 << (8 * width))
    made[at : at + width] = value.to_bytes(width, order)  # type: ignore[arg-type]
    return made


def _truncate(made: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    return made[: draw.choice((0, draw.randrange(len(made) + 1), max(0, len(made) - draw.randrange(1, 9))))]


def _remove(made: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    at = _place(made, draw)
    del made[at : at + draw.choice((1, 4, 64, 512))]
    return made


def _repeat(made: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    at, length = _place(made, draw), draw.choice((1, 16, 256))
    made[at:at] = made[at : at + length] * draw.choice((1, 2, 50))
    return made


def _insert(made: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    at = _place(made, draw)
    made[at:at] = draw.randbytes(draw.choice((1, 4, 32)))
    return made


def _zeros(made: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    at, length = _place(made, draw), draw.choice((8, 64, 512))
    made[at : at + length] = bytes(len(made[at : at + length]))
    return made


def _word(made: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    """A number or a word becomes another."""
    found = list(re.finditer(rb"[-+\w.]+", bytes(made[:20_000])))
    if found:
        one = draw.choice(found)
        made[one.start() : one.end()] = draw.choice(_WORDS)
    return made


def _line(made: bytearray, draw: random.Random, _: list[bytes]) -> bytearray:
    """A line goes, comes twice, or moves."""
    if len(made) > 50_000:
        return made
    lines = bytes(made).split(b"\n")
    line = lines.pop(draw.randrange(len(lines)))
    for _count in range(draw.choice((0, 1, 2))):
        lines.insert(draw.randrange(len(lines) + 1), line)
    return bytearray(b"\n".join(lines))


def _splice(made: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    other = draw.choice(others)
    start = draw.randrange(len(other) + 1)
    return made[: _place(made, draw)] + other[start : start + 4096]


def _replace(_made: bytearray, draw: random.Random, others: list[bytes]) -> bytearray:
    """The name of one format on the content of another."""
    return bytearray(draw.choice(others)[: 1 << 16])


_KINDS = (
    *(_flip, _byte, _integer, _truncate, _remove, _repeat, _insert, _zeros, _word, _word, _word),
    *(_line, _splice, _replace),
)
