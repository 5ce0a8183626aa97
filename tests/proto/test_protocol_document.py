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
from make_vectors import (
    DELAYED_WEIGHTS,
    DOCUMENT,
    PATH,
    TOKENS,
    contributions,
    feedback_before,
    fill,
    manifest,
    state,
    vectors,
)
from whole_update import commit

from diloco_cli.simulate.toy import Copy
from diloco_client import pulling, pushing, session
from diloco_client.flights import Base, Flight
from diloco_client.network import Network
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
from diloco_proto.wire import manifest_to_pb
from diloco_server import engine, limits, members, outer, pace, parameters, patience, pushes, rounds, run, weights
from diloco_server.config import RunConfig

TEXT = DOCUMENT.read_text()
PROSE = " ".join(TEXT.split())
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


# -- a second implementation, of frames, int4, e3m0, int2, ternary and the digest: from the document, no diloco --


def second_read(frame: bytes) -> tuple[int, list[float]]:
    """(first block, values) of a frame of int4, e3m0, int2 or ternary."""
    magic, number, flags, zero, first, n, scale_bytes, code_bytes, checksum = struct.unpack("<4sBBHIIIIQ", frame[:32])
    assert (magic, zero, flags & ~3, len(frame)) == (b"DLF1", 0, 0, 32 + scale_bytes + code_bytes)
    assert xxhash.xxh3_64_intdigest(frame[:24] + frame[32:], seed=0) == checksum
    wide = 32 if number in (4, 6) else 16
    assert 1 <= n <= (1 << 20) // wide
    scales, codes = frame[32 : 32 + scale_bytes], frame[32 + scale_bytes :]
    if flags & 1:
        scales = zstandard.decompress(scales, max_output_size=n)
    if flags & 2:
        codes = zstandard.decompress(codes, max_output_size=wide * n)
    assert (len(scales), len(codes)) == (n, wide * n)
    one = {4: second_int4, 6: second_e3m0, 8: second_int2, 9: second_ternary}[number]
    bits = wide // 8
    values: list[float] = []
    for b, scale_byte in enumerate(scales):
        packed = codes[wide * b : wide * b + wide]
        unpacked = [byte >> shift & (1 << bits) - 1 for shift in range(0, 8, bits) for byte in packed]
        scale = 2.0 ** (scale_byte - 127) if scale_byte else 0.0
        values += [one(code) * scale + 0.0 for code in unpacked]
    return first, values


def second_int4(code: int) -> float:
    assert code != 8
    return code - 16 if code > 8 else code


def second_e3m0(code: int) -> float:
    c = code & 7
    return (-1.0 if code & 8 else 1.0) * 2.0 ** (c - 7) if c else 0.0


def second_int2(code: int) -> float:
    return (code - 4 if code > 1 else code) + 0.5


def second_ternary(code: int) -> float:
    return {0: 0.0, 1: 1.0, 3: -1.0}[code]


def bits_of(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def second_mean(values: list[float]) -> int:
    y = [abs(x) / 64 if bits_of(abs(x)) >= 0x0D800000 else 0.0 for x in values]
    for half in (32, 16, 8, 4, 2, 1):
        sums = [y[j] + y[j + half] for j in range(half)]
        y = list(struct.unpack(f"<{half}f", struct.pack(f"<{half}f", *sums)))
    return bits_of(y[0])


def second_scale(number: int, top: int, mean: int) -> int:
    large, of_large, middle, of_mean = top >> 23, top & 0x7FFFFF, mean >> 23, mean & 0x7FFFFF
    return {
        4: large - 2 + (of_large > 0x600000),
        6: large + (of_large > 0x400000),
        8: max(middle + (of_mean > 0x080000), large - 3),
        9: min(max(middle + 1 + (of_mean > 0x600000), large - 1), large + (of_large > 0)),
    }[number]


def second_encode(number: int, values: list[float]) -> tuple[int, list[int]]:
    """(scale byte, codes) of one block of int4 (4), e3m0 (6), int2 (8) or ternary (9)."""
    top = max(bits_of(abs(x)) for x in values)
    if top < 0x0D800000:
        return 0, [0] * 64
    scale_byte = second_scale(number, top, second_mean(values))
    units = [Fraction(x) / Fraction(2) ** (scale_byte - 127) for x in values]
    if number in (8, 9):
        row = {-2: Fraction(-3, 2), -1: Fraction(-1, 2), 0: Fraction(1, 2), 1: Fraction(3, 2)}
        row = row if number == 8 else {-1: Fraction(-1), 0: Fraction(0), 1: Fraction(1)}
        return scale_byte, [min(row, key=lambda c: (abs(unit - row[c]), c & 1)) & 3 for unit in units]
    if number == 4:
        return scale_byte, [round(unit) & 15 for unit in units]
    steps = [Fraction(0), *(Fraction(2) ** (c - 7) for c in range(1, 8))]
    nearest = [min(range(8), key=lambda c: (abs(abs(unit) - steps[c]), c & 1)) for unit in units]
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
    for size in (1, 3):  # nearly all zeros
        yield np.where(np.arange(64) < size, rng.standard_normal(64), 0.0).astype(np.float32)
    for threshold in (17 / 16, 7 / 8):  # where int2 and ternary change their scale
        for step in (-1, 0, 1):
            yield (np.repeat([0.5, -1.5], 32) * threshold * (1 + step * 2.0**-22)).astype(np.float32)
    yield np.zeros(64, np.float32)


SECOND = pytest.mark.parametrize("fmt", [Format.INT4, Format.E3M0, Format.INT2, Format.TERNARY], ids=lambda f: f.label)


@pytest.mark.parametrize("level", [None, 1])
@SECOND
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


@SECOND
def test_an_encoder_written_from_the_document_writes_the_same(fmt: Format) -> None:
    for x in difficult_blocks(13):
        encoded = encode_fragment(fmt, x)
        scale_byte, codes = second_encode(int(fmt), x.tolist())
        wide = 32 if fmt in (Format.INT4, Format.E3M0) else 16
        packed = [sum(codes[j + i * wide] << i * wide // 8 for i in range(64 // wide)) for j in range(wide)]
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
    update: Encoded = commit(fragment, contributions(), TOKENS, settings)
    assert update.scales.tobytes().hex() == expected["scales"]
    assert update.codes.tobytes().hex() == expected["codes"]
    assert words(theta) == expected["theta"]
    assert words(momentum) == expected["momentum"]
    assert words(residual) == expected["residual"]
    assert f"{digest(theta):016x}" == expected["digest"]


def test_the_server_makes_the_delayed_steps() -> None:
    theta, momentum, residual = state()
    fragment = outer.FragmentState(theta, momentum, residual, np.zeros(64, np.float32))
    settings = outer.OuterSettings(optimizer="delayed-nesterov", lr=0.7, momentum=0.9, downlink=Format.INT4)
    assert fragment.buffer is not None
    for name, contribution, weight, delay in zip(
        ("push", "step"), contributions(), DELAYED_WEIGHTS, (2, 5), strict=True
    ):
        update = commit(fragment, [contribution], [weight], settings, delay=delay)
        expected = VECTORS["outer"]["delayed"][name]
        assert update.scales.tobytes().hex() == expected["scales"]
        assert update.codes.tobytes().hex() == expected["codes"]
        assert words(theta) == expected["theta"]
        assert words(momentum) == expected["momentum"]
        assert words(residual) == expected["residual"]
        assert words(fragment.buffer) == expected["buffer"]
        assert f"{digest(theta):016x}" == expected["digest"]
    assert fragment.buffered == 0


def test_the_worker_makes_the_error_feedback() -> None:
    expected = VECTORS["feedback"]
    residual, moved = feedback_before()
    delta = floats(VECTORS["block"]["input"])
    flight = Flight(
        fragment=0,
        base=Base(0, delta),
        captured=Copy(np.zeros_like(delta)),
        step=1,
        due_step=1,
        steps=1,
        tokens=1,
        tokens_until=1,
        since_version=0,
        feedback=True,
        residual=residual,
    )
    contribution = flight.encode(Format.INT2, delta)
    assert words(delta + residual) == expected["encoded"]
    assert contribution.scales.tobytes().hex() == expected["scales"]
    assert contribution.codes.tobytes().hex() == expected["codes"]
    assert flight.next_residual is not None
    assert flight.correction is not None
    assert words(flight.next_residual) == expected["residual"]
    assert words(moved + decode_fragment(contribution) + flight.correction) == expected["change"]


# -- the document prints the vectors and names everything --


def test_the_document_prints_these_vectors() -> None:
    filled, names = fill(TEXT, VECTORS)
    assert filled == TEXT, "run tests/proto/make_vectors.py"
    printed = {re.sub(r"\[.*", "", name) for name in names}
    wanted = {f"block.{fmt.label}.codes" for fmt in Format}
    wanted |= {f"block.{fmt.label}.scales" for fmt in Format if fmt.spec.scale_bytes}
    wanted |= {"block.input", "frame.plain", "frame.packed", "digest.one_block", "outer.digest"}
    wanted |= {"outer.delayed.push.digest", "outer.delayed.step.digest", "feedback.codes", "feedback.residual"}
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


def test_the_table_of_fates_is_whole() -> None:
    rows = [quoted(row[0]) for row in table("`Committed.fate`")]
    assert rows == [[name] for name, _ in pb.Fate.items()]


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


def beats_a_lease() -> float:
    trial = run.Run(RunConfig(lease_seconds=20.0))
    hello = pb.Hello(protocol=channel.PROTOCOL_VERSION, worker_id="w", manifest=manifest_to_pb(manifest()))
    trial.hello(hello, now=0.0)
    [welcome] = [event.welcome for _, event in trial.news.take() if event.HasField("welcome")]
    return 20.0 / welcome.heartbeat_seconds


def test_the_table_of_limits_is_that_of_the_code() -> None:
    rows = {row[0]: [int(n) for n in re.findall(r"\d+", row[1])] for row in table("limit")}
    assert rows["protocol version, in `Hello`"] == [channel.PROTOCOL_VERSION]
    assert channel.MAX_MESSAGE_BYTES in rows["gRPC message, both ways"]
    assert rows["frames a worker sends ahead of the last `Ack`"] == [channel.PUSH_WINDOW_FRAMES]
    assert rows["frames received between two `Ack`"] == [channel.ACK_EVERY_FRAMES]
    shares = [Fraction(s).as_integer_ratio() for s in (parameters.KEPT_SHARE, parameters.KEPT_SHARE_DELAYED)]
    assert rows["updates of a fragment that the server keeps"] == [parameters.KEPT_UPDATES, *shares[0], *shares[1]]
    assert rows["rounds of a fragment that the server keeps for `Status`"] == [rounds.KEPT_RECORDS]
    assert rows["workers that are gone and that the server still knows"] == [members.KEPT_GONE]
    cut = Fraction(members.CUT_SHARE).limit_denominator(100).as_integer_ratio()
    assert rows["lease"] == [beats_a_lease(), *cut]
    assert engine.SESSION_QUEUE in rows["events that wait for a worker that does not read"]
    largest = max(32 + fmt.spec.frame_blocks * (fmt.spec.scale_bytes + fmt.spec.code_bytes) for fmt in Format)
    assert largest in rows["frame"]
    options = dict(channel.CLIENT_OPTIONS) | dict(channel.SERVER_OPTIONS)
    pings = [options["grpc.keepalive_time_ms"] // 1000, options["grpc.keepalive_timeout_ms"] // 1000]
    assert rows["keepalive ping of HTTP, both ends"] == pings
    least = options["grpc.http2.min_ping_interval_without_data_ms"] // 1000
    assert rows["pings without data, least interval that the server accepts"] == [least]
    assert rows["keepalive ping, time to answer it while other bytes arrive"] == [
        options["grpc.http2.ping_timeout_ms"] // 1000
    ]
    bounds = limits.Bounds()
    silences = [bounds.first_seconds, bounds.frame_seconds, bounds.unread_seconds]
    calls = "first message of a call, next frame of a push, reading of a message of a pull"
    assert rows[calls] == silences
    peer = "open calls of one address that have sent no `Hello` or header; sessions of a worker; its pushes; pulls of"
    assert rows[f"{peer} one address"] == [most for _, most in bounds.peer]
    assert rows["each of these of all together"] == [most for _, most in bounds.total]
    assert rows["while a push waits for its outcome, the last `Ack` again"] == [channel.ANSWER_SECONDS]
    assert rows["stripes of one pull"] == [channel.MAX_DATA_CONNECTIONS]
    assert pushes.LEAST_IN_FLIGHT in rows["bytes of all incomplete contributions, encoded"]
    assert pushing.MAX_DAMAGED == pulling.MAX_DAMAGED == 5
    assert "at most 5 times in a row" in PROSE
    patience = Network().progress_timeout
    assert f"no message has gone or come for {patience:.0f} s" in PROSE
    assert f"up to {pushing.SLOWEST * patience:.0f} s" in PROSE
    silence = f"{session.SILENT_BEATS:.0f} times `Welcome.heartbeat_seconds`, at least {session.LEAST_SILENCE:.0f} s"
    assert silence in PROSE


@pytest.mark.parametrize(
    "wanted",
    [
        f"at most {weights.MAX_WEIGHT:g} times the median",
        f"last {weights.KEPT_VALUES} z",
        f"last {weights.KEPT_VALUES} counted n",
        f"last {rounds.KEPT_TIMES} rounds in which nobody was missing, and at least {rounds.MIN_AUTO_GRACE:g} s",
        f"{patience.HANG_ROUNDS:g} times the median length of the last {rounds.KEPT_TIMES} rounds",
        f"multiplies the sums by {pace.MEMORY:g}",
        f"⌈{pace.HIGH:g}·n⌉-th smallest",
        f"{pace.DEAD_BAND:g}·H₀",
    ],
)
def test_the_numbers_of_rounds_are_those_of_the_code(wanted: str) -> None:
    assert wanted in PROSE


@pytest.mark.parametrize(
    ("wanted", "code", "value"),
    [
        ("a third of the lease", members.CUT_SHARE, 1 / 3),
        ("more than half a lease", patience.STOOD_STILL, 1 / 2),
        ("c = (⅓·w) / N", parameters.BUFFER_STEP, 1 / 3),
        ("`auto`: 4 times the live workers", RunConfig(outer_optimizer=outer.DELAYED).staleness_limit(3), 4 * 3),
    ],
)
def test_the_shares_of_rounds_are_those_of_the_code(wanted: str, code: float, value: float) -> None:
    assert wanted in PROSE
    assert code == value
