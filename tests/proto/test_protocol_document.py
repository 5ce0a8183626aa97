"""docs/protocol.md against the code: its examples, its tables, its names, and a decoder written from it alone."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from make_vectors import DOCUMENT, PATH, TOKENS, contributions, fill, state, vectors

from diloco_proto import channel, errors
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import (
    Encoded,
    Format,
    decode_fragment,
    digest,
    encode_fragment,
    frame_checksum,
    pack_frames,
    read_frame,
)
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Manifest, Pattern, Role, TensorSpec, build_layout
from diloco_server import engine, outer, parameters

TEXT = DOCUMENT.read_text()
VECTORS: dict[str, Any] = json.loads(PATH.read_text())


def floats(words: list[str]) -> Floats:
    return np.array([int(w, 16) for w in words], np.uint32).view(np.float32)


def words(values: Floats) -> list[str]:
    return [f"{b:08x}" for b in values.view(np.uint32)]


def table(first_heading: str) -> list[list[str]]:
    """The rows, as cells, of the document's table whose first column has this heading."""
    found = re.search(rf"^\| {re.escape(first_heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert found, f"the document has no table {first_heading!r}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found[1].splitlines()]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# -- a second implementation, of frames, int4, e3m0 and the digest: from the document, no diloco --


def second_read(frame: bytes) -> tuple[int, list[float]]:
    """(first block, values) of a frame of int4 or e3m0."""
    magic, number, flags, zero, first, n, scale_bytes, code_bytes, checksum = struct.unpack("<4sBBHIIIIQ", frame[:32])
    assert (magic, zero, flags & ~3, len(frame)) == (b"DLF1", 0, 0, 32 + scale_bytes + code_bytes)
    assert xxhash.xxh3_64_intdigest(frame[:24] + frame[32:], seed=0) == checksum
    assert 1 <= n <= 32768
    scales, codes = frame[32 : 32 + scale_bytes], frame[32 + scale_bytes :]
    if flags & 1:
        scales = zstandard.decompress(scales, max_output_size=n)
    if flags & 2:
        codes = zstandard.decompress(codes, max_output_size=32 * n)
    assert (len(scales), len(codes)) == (n, 32 * n)
    one = {4: second_int4, 6: second_e3m0}[number]
    values: list[float] = []
    for b, scale_byte in enumerate(scales):
        packed = codes[32 * b : 32 * b + 32]
        nibbles = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
        scale = 2.0 ** (scale_byte - 127) if scale_byte else 0.0
        values += [one(nibble) * scale + 0.0 for nibble in nibbles]
    return first, values


def second_int4(code: int) -> float:
    assert code != 8
    return code - 16 if code > 8 else code


def second_e3m0(code: int) -> float:
    c = code & 7
    return (-1.0 if code & 8 else 1.0) * 2.0 ** (c - 7) if c else 0.0


def second_encode(number: int, values: list[float]) -> tuple[int, list[int]]:
    """(scale byte, codes) of one block of int4 (4) or e3m0 (6)."""
    top = max(struct.unpack("<I", struct.pack("<f", x))[0] & 0x7FFFFFFF for x in values)
    if top < 0x0D800000:
        return 0, [0] * 64
    e, m = top >> 23, top & 0x7FFFFF
    scale_byte = e - 2 + (m > 0x600000) if number == 4 else e + (m > 0x400000)
    units = [Fraction(x) / Fraction(2) ** (scale_byte - 127) for x in values]
    if number == 4:
        return scale_byte, [round(unit) & 15 for unit in units]
    row = [Fraction(0), *(Fraction(2) ** (c - 7) for c in range(1, 8))]
    nearest = [min(range(8), key=lambda c: (abs(abs(unit) - row[c]), c & 1)) for unit in units]
    return scale_byte, [c + 8 if c and unit < 0 else c for c, unit in zip(nearest, units, strict=True)]


def second_digest(values: list[int]) -> int:
    modulus = 1 << 64
    g = 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % modulus
        z = (z ^ z >> 27) * 0x94D049BB133111EB % modulus
        return z ^ z >> 31

    keys = [mix((i + 1) * g % modulus) >> 32 for i in range(64)]
    total = 0
    for b in range(len(values) // 64):
        v = [(x + k) % (1 << 32) for x, k in zip(values[64 * b :], keys, strict=False)]
        h = sum(v[j] * v[j + 32] for j in range(32))
        total += mix((h + (b + 1) * g) % modulus)
    return total % modulus


def difficult_blocks(seed: int) -> Iterator[Floats]:
    """Blocks over the whole range of magnitudes, with ties, zeros, values to flush and both signs."""
    rng = np.random.default_rng(seed)
    for exponent in (-110, -100, -99, -30, -3, 0, 5, 60, 124):
        values = rng.standard_normal(64)
        values *= 0.99 / np.abs(values).max()
        yield np.ldexp(values, exponent + 1).astype(np.float32)
        grid = rng.choice([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 3 / 128], 64) * rng.choice([-1, 1], 64)
        yield np.ldexp(grid, exponent).astype(np.float32)
    yield np.zeros(64, np.float32)


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("fmt", [Format.INT4, Format.E3M0])
def test_a_decoder_written_from_the_document_reads_what_the_encoder_writes(fmt: Format, level: int | None) -> None:
    x = np.concatenate([*difficult_blocks(7), np.zeros(64 * 20, np.float32)])
    encoded = encode_fragment(fmt, x)
    [frame] = pack_frames(encoded, first_block=3, level=level)
    assert bool(frame[5]) == (level is not None)
    first, values = second_read(frame)
    assert first == 3
    ours = decode_fragment(encoded)
    assert values == ours.tolist()
    assert not np.signbit(ours[ours == 0]).any()


@pytest.mark.parametrize("fmt", [Format.INT4, Format.E3M0])
def test_an_encoder_written_from_the_document_writes_the_same(fmt: Format) -> None:
    for x in difficult_blocks(13):
        encoded = encode_fragment(fmt, x)
        scale_byte, codes = second_encode(int(fmt), x.tolist())
        packed = [low | high << 4 for low, high in zip(codes[:32], codes[32:], strict=True)]
        assert (encoded.scales.tolist(), encoded.codes.tolist()) == ([scale_byte], packed)


def test_a_digest_written_from_the_document_agrees() -> None:
    x = np.concatenate(list(difficult_blocks(11)))
    assert second_digest([int(w, 16) for w in words(x)]) == digest(x)


def test_the_second_implementation_reads_the_printed_examples() -> None:
    assert second_read(bytes.fromhex(VECTORS["frame"]["plain"])) == (5, floats(block("int4", "decoded")).tolist())
    e3m0 = floats(block("e3m0", "decoded")).tolist()
    assert second_read(bytes.fromhex(VECTORS["frame"]["packed"])) == (7, e3m0 + [0.0] * 64)
    assert f"{second_digest([int(w, 16) for w in VECTORS['block']['input']]):016x}" == VECTORS["digest"]["one_block"]


# -- the code reproduces the vectors --


def block(label: str, what: str) -> Any:
    return VECTORS["block"][label][what]


def test_the_reference_makes_these_vectors() -> None:
    made = vectors()
    made["frame"].pop("packed")  # compressed bytes are the zstd library's affair
    kept = {**VECTORS, "frame": {k: v for k, v in VECTORS["frame"].items() if k != "packed"}}
    assert made == kept


@pytest.mark.parametrize("fmt", list(Format))
def test_the_kernels_make_the_blocks(fmt: Format) -> None:
    encoded = encode_fragment(fmt, floats(VECTORS["block"]["input"]))
    assert encoded.scales.tobytes().hex() == block(fmt.label, "scales")
    assert encoded.codes.tobytes().hex() == block(fmt.label, "codes")
    assert words(decode_fragment(encoded)) == block(fmt.label, "decoded")


def test_frames_are_these_bytes() -> None:
    int4 = encode_fragment(Format.INT4, floats(VECTORS["block"]["input"]))
    [plain] = pack_frames(int4, first_block=5, level=None)
    assert plain.hex() == VECTORS["frame"]["plain"]
    assert f"{frame_checksum(plain):016x}" == VECTORS["frame"]["plain_checksum"]
    packed = read_frame(bytes.fromhex(VECTORS["frame"]["packed"]))
    assert (packed.format, packed.first_block, packed.num_blocks) == (Format.E3M0, 7, 2)
    assert packed.scales.tobytes().hex() == block("e3m0", "scales") + "00"
    assert packed.codes.tobytes().hex() == block("e3m0", "codes") + "00" * 32


def test_the_digest_kernel_makes_the_digests() -> None:
    x, expected = floats(VECTORS["block"]["input"]), VECTORS["digest"]
    assert f"{digest(x):016x}" == expected["one_block"]
    assert f"{digest(x, 5):016x}" == expected["at_block_5"]
    assert f"{digest(np.concatenate([x, -x, x])):016x}" == expected["three_blocks"]


@pytest.mark.parametrize("pattern", list(Pattern))
def test_the_layout_has_this_fingerprint(pattern: Pattern) -> None:
    tensors = tuple(
        TensorSpec(t["name"], tuple(t["shape"]), t["dtype"], Role(t["role"]), tuple(t["tied"]))
        for t in VECTORS["layout"]["manifest"]
    )
    layout = build_layout(Manifest(tensors), 2, pattern)
    assert f"{layout.fingerprint:016x}" == VECTORS["layout"][pattern.value]["fingerprint"]
    for row, tensor in zip(table("name"), tensors, strict=True):
        assert row == [tensor.name, str(list(tensor.shape)), tensor.dtype, tensor.role.value]


def test_the_server_makes_the_outer_step() -> None:
    expected = VECTORS["outer"]
    theta, momentum, residual = state()
    fragment = outer.FragmentState(theta, momentum, residual)
    settings = outer.OuterSettings(optimizer="nesterov", lr=0.7, momentum=0.9, downlink=Format.INT4)
    update: Encoded = outer.commit(fragment, contributions(), TOKENS, settings)
    assert update.scales.tobytes().hex() == expected["scales"]
    assert update.codes.tobytes().hex() == expected["codes"]
    assert words(theta) == expected["theta"]
    assert words(momentum) == expected["momentum"]
    assert words(residual) == expected["residual"]
    assert f"{digest(theta):016x}" == expected["digest"]


# -- the document prints the vectors and names everything --


def test_the_document_prints_these_vectors() -> None:
    filled, names = fill(TEXT, VECTORS)
    assert filled == TEXT, "run tests/proto/make_vectors.py"
    printed = {re.sub(r"\[.*", "", name) for name in names}
    wanted = {f"block.{fmt.label}.codes" for fmt in Format}
    wanted |= {f"block.{fmt.label}.scales" for fmt in Format if fmt.spec.scale_bytes}
    wanted |= {"block.input", "frame.plain", "frame.packed", "digest.one_block", "outer.digest"}
    wanted |= {"layout.strided.text", *(f"layout.{p.value}.fingerprint" for p in Pattern)}
    assert wanted <= printed


ENUM_VALUES = [v.name for e in pb.DESCRIPTOR.enum_types_by_name.values() for v in e.values]


@pytest.mark.parametrize("name", ENUM_VALUES)
def test_every_enum_value_is_named(name: str) -> None:
    assert f"`{name}`" in TEXT


WRAPPERS = ("SessionRequest", "SessionEvent", "PushRequest", "PushReply", "PullReply")
"""Messages that are nothing but a choice of others."""

MESSAGES = {name: message for name, message in pb.DESCRIPTOR.message_types_by_name.items() if name not in WRAPPERS}


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_and_field_is_named(name: str) -> None:
    for wanted in (name, *(f.name for f in MESSAGES[name].fields)):
        assert re.search(rf"`(\w+\.)?{wanted}(\.\w+)?`s?", TEXT), f"{name}: {wanted} is not in the document"


@pytest.mark.parametrize("name", ["PushHeader", "PullRequest", "Item"])
def test_tables_of_messages_have_every_field(name: str) -> None:
    rows = [field for row in table(f"`{name}`") for field in quoted(row[0])]
    assert sorted(rows) == sorted(f.name for f in MESSAGES[name].fields)


@pytest.mark.parametrize(("heading", "wrapper"), [("request", "SessionRequest"), ("event", "SessionEvent")])
def test_tables_of_the_session_have_every_message(heading: str, wrapper: str) -> None:
    rows = {quoted(row[0])[0]: quoted(row[1]) for row in table(heading)}
    fields = pb.DESCRIPTOR.message_types_by_name[wrapper].fields
    bodies = [body for field in fields if (body := field.message_type)]
    assert rows.keys() == {body.name for body in bodies}
    for body in bodies:
        assert {field.name for field in body.fields} <= set(rows[body.name]), body.name


def test_the_table_of_outcomes_is_whole() -> None:
    rows = [quoted(row[0])[0] for row in table("`Outcome.kind`")]
    assert rows == [name for name, number in pb.OutcomeKind.items() if number]


def test_the_table_of_formats_is_that_of_the_code() -> None:
    rows = table("format")
    assert [row[0] for row in rows] == [fmt.label for fmt in Format]
    for fmt, (_, enum, number, code_bytes, _, legal, frame_blocks) in zip(Format, rows, strict=True):
        spec = fmt.spec
        assert pb.Codec.Value(quoted(enum)[0]) == int(number) == fmt
        assert (int(code_bytes), int(frame_blocks)) == (spec.code_bytes, spec.frame_blocks)
        assert legal == (f"0, {spec.min_scale} to {spec.max_scale}" if spec.scale_bytes else "")


def test_the_table_of_errors_is_that_of_the_code() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.DilocoError)]
    travel = {c.__name__: c.status.name for c in classes if c is not errors.DilocoError}
    travel = {name: status for name, status in travel.items() if type(errors.from_wire(name, "")).__name__ == name}
    rows = table(f"`{errors.ERROR_KEY}`")
    assert {quoted(row[0])[0]: quoted(row[1])[0] for row in rows} == travel


def test_the_table_of_limits_is_that_of_the_code() -> None:
    rows = {row[0]: [int(n) for n in re.findall(r"\d+", row[1])] for row in table("limit")}
    assert rows["protocol version, in `Hello`"] == [channel.PROTOCOL_VERSION]
    assert channel.MAX_MESSAGE_BYTES in rows["gRPC message, both ways"]
    assert rows["frames a worker sends ahead of the last `Ack`"] == [channel.PUSH_WINDOW_FRAMES]
    assert rows["frames received between two `Ack`"] == [channel.ACK_EVERY_FRAMES]
    assert rows["updates of a fragment that the server keeps"] == [parameters.KEPT_UPDATES]
    assert engine.SESSION_QUEUE in rows["events that wait for a worker that does not read"]
    largest = max(32 + fmt.spec.frame_blocks * (fmt.spec.scale_bytes + fmt.spec.code_bytes) for fmt in Format)
    assert largest in rows["frame"]
    options = dict(channel.CLIENT_OPTIONS) | dict(channel.SERVER_OPTIONS)
    pings = [options["grpc.keepalive_time_ms"] // 1000, options["grpc.keepalive_timeout_ms"] // 1000]
    assert rows["keepalive ping of HTTP, both ends"] == pings
    least = options["grpc.http2.min_ping_interval_without_data_ms"] // 1000
    assert rows["pings without data, least interval that the server accepts"] == [least]
