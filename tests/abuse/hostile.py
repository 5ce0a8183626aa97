"""Calls that no client makes: valid ones mutated, cut short, repeated, put out of order. The same seed, the same calls.

What they never do is what a worker with a token is allowed to: contribute. So no valid frame with the first block of a
fragment is in any of them, and none says that it comes from a steady worker's process.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import zstandard
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from raw_worker import frames_of, header, hello
from steady import GENERATION, MODEL, SIZES, STEADY

from diloco_proto import outer_pb2 as pb
from diloco_proto.channel import MAX_MESSAGE_BYTES
from diloco_proto.codec import CorruptFrame, Format, read_frame
from diloco_proto.codec.frames import _HEAD, _SUM, HEADER_BYTES, _checksum

MEMBERS = tuple(f"member-{i}" for i in range(6))
"""Hostile workers that have a session all the time: their pushes get beyond the first check."""

GUESTS = tuple(f"guest-{i}" for i in range(40))
"""Those whose sessions come and go."""

INTEGERS = (0, 1, 2, 7, 63, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LARGE = (1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
FLOATS = (0.0, -1.0, 5e-324, 1e308, float("nan"), float("inf"), float("-inf"))
STRINGS = ("", "x", "../../etc/passwd", "a\nb 2026-01-01 ERROR forged", "\0", "ключ 🔑", "%s%n{}", *STEADY, "y" * 9000)
UNSIGNED_32 = (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32)
UNSIGNED_64 = (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64)

UNIFORM_WIRE = b"\xff" * 10


@dataclass(frozen=True, slots=True)
class Call:
    """What one stranger does on one stream."""

    number: int
    label: str
    method: str
    messages: tuple[bytes, ...]
    ends: bool
    """Closes its side in order; else it goes away, in the middle of everything."""


def rounds_at(number: int) -> int:
    """So many rounds of each fragment are to be over by the time of this call."""
    return 1 + number // 200


class Hostile:
    """Makes the calls. Each depends on the seed and its number alone."""

    def __init__(self, seed: int, run_id: str) -> None:
        self._seed = seed
        self._run_id = run_id

    def call(self, number: int) -> Call:
        dice = random.Random(f"{self._seed}/{number}")
        kind = dice.choices(("push", "session", "pull", "other"), (24, 10, 4, 1))[0]
        label, method, messages = _MAKERS[kind](dice, self._run_id, number)
        messages, twist = _twist(dice, messages)
        messages = [_harmless(m) for m in messages]
        return Call(number, f"{kind}: {label}{twist}", method, tuple(messages), dice.random() < 0.9)


# -- whole streams --


def _twist(dice: random.Random, messages: list[bytes]) -> tuple[list[bytes], str]:
    """Something that may happen to any stream."""
    what = dice.choices(("", "shuffled", "twice", "cut short", "garbage", "bytes"), (10, 1, 1, 1, 1, 3))[0]
    if what == "shuffled":
        dice.shuffle(messages)
    elif what == "twice":
        messages = messages * 2
    elif what == "cut short":
        messages = messages[: dice.randrange(len(messages) + 1)]
    elif what == "garbage":
        messages.insert(dice.randrange(len(messages) + 1), dice.randbytes(dice.choice((0, 1, 9, 300))))
    elif what == "bytes" and messages:
        at = dice.randrange(len(messages))
        messages[at] = mangled(dice, messages[at])
    return messages, f", {what}" if what else ""


def mangled(dice: random.Random, data: bytes) -> bytes:
    """The bytes, damaged in one of several ways."""
    at, length = dice.randrange(len(data) + 1), dice.choice((1, 2, 8, 40))
    match dice.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + dice.randbytes(length) + data[at:]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[:at] + data[at : at + length] * 2 + data[at + length :]
        case 4:
            return data[:at] + UNIFORM_WIRE[:length] + data[at + length :]  # lengths that lie
        case _:
            changed = bytearray(data)
            for _ in range(length if changed else 0):
                changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
            return bytes(changed)


def set_odd(dice: random.Random, message: Message) -> str:
    """Set one field of the message, or of one within it, to something odd; returns its name."""
    field = dice.choice(message.DESCRIPTOR.fields)
    if field.message_type is not None and not field.message_type.GetOptions().map_entry:
        inner = getattr(message, field.name)
        if not field.is_repeated:
            inner.SetInParent()
            return f"{field.name}.{set_odd(dice, inner)}" if field.message_type.fields else field.name
        for _ in range(dice.choice((1,) * 20 + (2, 5000))):
            inner.add()
        return f"{field.name}.{set_odd(dice, dice.choice(inner))}"
    values = [_odd(dice, field) for _ in range(dice.choice((0, 1, 3) * 7 + (20000,)) if field.is_repeated else 1)]
    if field.is_repeated:
        getattr(message, field.name)[:] = values
    else:
        setattr(message, field.name, values[0])
    return field.name


def _odd(dice: random.Random, field: FieldDescriptor) -> object:
    match field.type:
        case FieldDescriptor.TYPE_ENUM:
            return dice.choice((-1, 0, 1, 2, 3, 9, 10, 99, (1 << 31) - 1, -(1 << 31)))
        case FieldDescriptor.TYPE_BOOL:
            return dice.random() < 0.5
        case FieldDescriptor.TYPE_DOUBLE:
            return dice.choice(FLOATS)
        case FieldDescriptor.TYPE_STRING:
            return dice.choice(STRINGS)
        case FieldDescriptor.TYPE_BYTES:
            return dice.randbytes(dice.choice((0, 31, 5000)))
        case kind if kind in UNSIGNED_32:
            return dice.choice(INTEGERS)
        case kind if kind in UNSIGNED_64:
            return dice.choice(INTEGERS + LARGE)
        case kind:
            raise AssertionError(f"{field.full_name} has type {kind}: say what would be odd")


# -- sessions --


def _session(dice: random.Random, run_id: str, number: int) -> tuple[str, str, list[bytes]]:
    generation = max(0, number - dice.choice((0, 0, 0, 999)))
    first = hello(dice.choice(GUESTS), MODEL, generation=generation, run_id=dice.choice(("", run_id)))
    label = "as it should be"
    if dice.random() < 0.6:
        label = set_odd(dice, first)
    messages = [pb.SessionRequest(hello=first)]
    for _ in range(dice.randrange(20)):
        request = pb.SessionRequest()
        body = dice.choice(("heartbeat", "heartbeat", "heartbeat", "finished", "finishing", "leave", "hello", "ready"))
        if body != "ready" or dice.random() < 0.05:  # for whoever is ready a round waits a while
            inner = getattr(request, body)
            inner.SetInParent()
            for _ in range(dice.randrange(4) if inner.DESCRIPTOR.fields else 0):
                set_odd(dice, inner)
        messages.append(request)
    return label, "Session", [m.SerializeToString() for m in messages]


# -- pushes --


def _push(dice: random.Random, run_id: str, number: int) -> tuple[str, str, list[bytes]]:
    fragment = dice.choice((0, 0, 0, 1, 1, 1, 2, 2, 3))
    fmt = Format.INT4 if fragment < 2 else Format.FP32
    blocks = -(-SIZES[fragment] // 64)
    parts, frames = [], []
    start = dice.choice((0, 1, 1, 1))
    while start < blocks:  # every part has frames of its own
        count = dice.choice((1, 1, 1, dice.randint(1, blocks - start)))
        values = np.random.default_rng(dice.getrandbits(32)).standard_normal(64 * count, np.float32)
        parts.append(pb.Part(first_block=start, num_blocks=count))
        frames += frames_of(values, fmt, start)
        start += count
    version = max(0, rounds_at(number) + dice.choice((0, 0, 0, -1, -1, 1)))
    label = "as it should be"
    if dice.random() < 0.55:
        at = dice.randrange(len(frames))
        label, frames[at] = _odd_frame(dice, frames[at], fmt)
    announced = [f if len(f) >= HEADER_BYTES else bytes(HEADER_BYTES) for f in frames]
    first = header(
        dice.choice(MEMBERS if dice.random() < 0.9 else GUESTS),
        fragment,
        announced,
        blocks,
        run_id=dice.choice(("", run_id, run_id)),
        codec=int(fmt),
        parts=parts,
        base_version=version,
        since_version=max(0, version - dice.randrange(3)),
        purpose=dice.choice(
            (pb.PURPOSE_CONTRIBUTION, pb.PURPOSE_CONTRIBUTION, pb.PURPOSE_CONTRIBUTION, pb.PURPOSE_SEED)
        ),
    )
    if dice.random() < 0.4:
        label += f", {set_odd(dice, first)}"
    messages = [pb.PushRequest(header=first), *(pb.PushRequest(frame=f) for f in frames)]
    if dice.random() < 0.02:
        label += ", too long"
        messages.append(pb.PushRequest(frame=bytes(dice.choice((2 << 20, MAX_MESSAGE_BYTES - 100, MAX_MESSAGE_BYTES)))))
    return label, "Push", [m.SerializeToString() for m in messages]


def _odd_frame(dice: random.Random, frame: bytes, fmt: Format) -> tuple[str, bytes]:
    what = dice.choice(tuple(_FRAMES))
    return what, _FRAMES[what](dice, frame, fmt)


def _sealed(frame: bytes | bytearray) -> bytes:
    """With the checksum that belongs to these bytes, so that only what they say is wrong."""
    changed = bytearray(frame)
    if len(changed) >= HEADER_BYTES:
        view = memoryview(bytes(changed))
        _SUM.pack_into(changed, _HEAD.size, _checksum(view[: _HEAD.size], view[HEADER_BYTES:]))
    return bytes(changed)


def _another_header(dice: random.Random, frame: bytes, fmt: Format) -> bytes:
    fields = list(_HEAD.unpack_from(frame))
    at = dice.randrange(1, len(fields))
    largest = 255 if at in (1, 2) else 65535 if at == 3 else (1 << 32) - 1
    fields[at] = dice.choice([i for i in INTEGERS if i <= largest])
    return _sealed(_HEAD.pack(*fields) + frame[_HEAD.size :])


def _another_body(dice: random.Random, frame: bytes, fmt: Format) -> bytes:
    """Scales, codes and values that no encoder writes: NaN and Inf in fp32, infinite scales, −8."""
    body = bytearray(frame[HEADER_BYTES:])
    for _ in range(dice.choice((1, 4, len(body)))):
        body[dice.randrange(len(body))] = dice.choice((0x00, 0x7F, 0x80, 0x88, 0xFF))
    return _sealed(frame[:HEADER_BYTES] + body)


def _bomb(dice: random.Random, frame: bytes, fmt: Format) -> bytes:
    """Few bytes that become very many, that say so or not, or that are no zstd at all."""
    fields = list(_HEAD.unpack_from(frame))
    due = fields[5] * fmt.spec.code_bytes
    size = dice.choice((due, due + 1, 64 << 10, 8 << 20))
    says = dice.random() < 0.5
    codes = zstandard.ZstdCompressor(level=1, write_content_size=says).compress(bytes(size))
    if dice.random() < 0.3:
        codes = mangled(dice, codes)
    if size == due and dice.random() < 0.5:
        codes += zstandard.ZstdCompressor().compress(bytes(1 << 20))
    scales = fields[5] * fmt.spec.scale_bytes
    head = _HEAD.pack(*fields[:2], 2, 0, *fields[4:6], scales, len(codes))
    return _sealed(head + bytes(8) + bytes(scales) + codes)


_FRAMES: dict[str, Callable[[random.Random, bytes, Format], bytes]] = {
    "damaged frame": lambda dice, frame, _: mangled(dice, frame),
    "sealed damage": lambda dice, frame, _: _sealed(mangled(dice, frame)),
    "header of a frame": _another_header,
    "body of a frame": _another_body,
    "bomb": _bomb,
    "another format": lambda dice, frame, _: frames_of([1.0] * 64, dice.choice(tuple(Format)), dice.randrange(3))[0],
    "empty frame": lambda dice, frame, _: b"",
    "a frame and more": lambda dice, frame, _: frame + dice.randbytes(dice.choice((1, 3000))),
}


# -- the rest --


def _pull(dice: random.Random, run_id: str, number: int) -> tuple[str, str, list[bytes]]:
    request = pb.PullRequest(run_id=dice.choice(("", run_id)), fragment=dice.randrange(5), snapshot=dice.random() < 0.5)
    names = [set_odd(dice, request) for _ in range(dice.randrange(4))]
    return " ".join(names) or "as it should be", "Pull", [request.SerializeToString()]


def _other(dice: random.Random, run_id: str, number: int) -> tuple[str, str, list[bytes]]:
    method = dice.choice(("Describe", "Status", "Status", "Rollback", "pull"))
    request = pb.StatusRequest(rounds=dice.choice(INTEGERS)) if method == "Status" else pb.DescribeRequest()
    return method, method, [request.SerializeToString()]


_MAKERS = {"push": _push, "session": _session, "pull": _pull, "other": _other}


def _harmless(message: bytes) -> bytes:
    """The message, unless it is what a worker may do: see the module."""
    return b"\x0a\x00" if _may_count(message) else message


def _may_count(message: bytes) -> bool:
    request, session = pb.PushRequest(), pb.SessionRequest()
    with suppress(DecodeError, CorruptFrame):
        request.ParseFromString(message)
        if request.WhichOneof("body") == "frame" and read_frame(request.frame).first_block == 0:
            return True
    with suppress(DecodeError):
        session.ParseFromString(message)
    return any(m.worker_id in STEADY and m.generation >= GENERATION for m in (request.header, session.hello))
