"""Writes vectors.json: the worked examples of docs/protocol.md, made by the numpy reference.

Run it only when the protocol changes: `python tests/proto/make_vectors.py` writes both the file and the values printed
in the document. Numbers are hexadecimal text, most significant digit first; `codes`, `scales` and frames are byte
strings; float32 values are lists of their bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from diloco_proto.codec import Encoded, Format, frame_checksum, pack_frames, reference
from diloco_proto.codec.digest import KEYS, digest_reference
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Manifest, Pattern, Role, TensorSpec, build_layout

PATH = Path(__file__).with_name("vectors.json")
DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"

MU, LR = 0.9, 0.7
TOKENS = (100, 200)
DELAYED_WEIGHTS = (1.25, 0.75)


def bits(values: Floats) -> list[str]:
    return [f"{b:08x}" for b in values.view(np.uint32)]


def block() -> Floats:
    """float32[64]: 5·(j − 24)/256, but for a magnitude to flush, a negative zero and a value with a long mantissa."""
    x = (5 * (np.arange(64) - 24) / 256).astype(np.float32)
    x[:3] = 2.0**-101, -0.0, 1 / 3
    return x


def encoded(fmt: Format, x: Floats) -> Encoded:
    return Encoded(fmt, *reference.encode(fmt, x))


def blocks() -> dict[str, Any]:
    x = block()
    result: dict[str, Any] = {"input": bits(x)}
    for fmt in Format:
        e = encoded(fmt, x)
        result[fmt.label] = {
            "scales": e.scales.tobytes().hex(),
            "codes": e.codes.tobytes().hex(),
            "decoded": bits(reference.decode(fmt, e.scales, e.codes)),
        }
    return result


def frames() -> dict[str, Any]:
    x = block()
    plain = pack_frames(encoded(Format.INT4, x), first_block=5, level=None)[0]
    packed = pack_frames(encoded(Format.E3M0, np.concatenate([x, np.zeros(64, np.float32)])), first_block=7)[0]
    assert packed[5] == 2
    return {
        "plain": plain.hex(),
        "plain_checksum": f"{frame_checksum(plain):016x}",
        "packed": packed.hex(),
    }


def digests() -> dict[str, Any]:
    x = block()
    words = x.view(np.uint32) + KEYS
    h = sum(int(a) * int(b) for a, b in zip(words[:32], words[32:], strict=True)) % 2**64
    return {
        "keys": [f"{k:08x}" for k in KEYS],
        "h": f"{h:016x}",
        "one_block": f"{digest_reference(x):016x}",
        "at_block_5": f"{digest_reference(x, 5):016x}",
        "three_blocks": f"{digest_reference(np.concatenate([x, -x, x])):016x}",
    }


def manifest() -> Manifest:
    f32, bf16 = "float32", "bfloat16"
    return Manifest(
        (
            TensorSpec("tok.weight", (10, 8), f32, Role.TRAINED, ("head.weight",)),
            TensorSpec("pos.weight", (16, 8), f32, Role.FROZEN),
            TensorSpec("blocks.0.attn.weight", (8, 24), f32, Role.TRAINED),
            TensorSpec("blocks.0.norm.weight", (8,), bf16, Role.TRAINED),
            TensorSpec("blocks.1.attn.weight", (8, 24), f32, Role.TRAINED),
            TensorSpec("blocks.1.norm.weight", (8,), bf16, Role.TRAINED),
            TensorSpec("norm.weight", (8,), f32, Role.TRAINED),
            TensorSpec("scale", (), f32, Role.TRAINED),
        )
    )


def layouts() -> dict[str, Any]:
    model = manifest()
    result: dict[str, Any] = {
        "manifest": [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "role": t.role.value, "tied": list(t.tied)}
            for t in model.tensors
        ]
    }
    for pattern in Pattern:
        layout = build_layout(model, 2, pattern)
        result[pattern.value] = {
            "text": [
                f"{f.index}\t{f.role}\t{s.offset}\t{s.tensor.name}\t{s.tensor.dtype}\t{list(s.tensor.shape)}"
                for f in layout.fragments
                for s in f.slots
            ],
            "fingerprint": f"{layout.fingerprint:016x}",
        }
    return result


def state() -> tuple[Floats, Floats, Floats]:
    """(theta, momentum, residual) before the step, float32[64] each."""
    j = np.arange(64)
    f32 = np.float32
    return (1 + j / 64).astype(f32), (j / 512).astype(f32), ((j % 5 - 2) / 1024).astype(f32)


def contributions() -> list[Encoded]:
    other = ((17 - np.arange(64)) / 64).astype(np.float32)
    return [encoded(Format.INT4, block()), encoded(Format.INT4, other)]


def outer_step() -> dict[str, Any]:
    theta, momentum, residual = state()
    before = {"theta": bits(theta), "momentum": bits(momentum), "residual": bits(residual)}
    coefficients = [np.float32(t / sum(TOKENS)) for t in TOKENS]
    mean = np.zeros(64, np.float32)
    for c, weight in zip(contributions(), coefficients, strict=True):
        mean = reference.accumulate(c.format, c.scales, c.codes, float(weight), mean)
    momentum, u = reference.nesterov(mean, momentum, residual, MU, LR)
    scales, codes, residual, theta = reference.encode_feedback(Format.INT4, u, theta)
    return {
        "before": before,
        "contributions": [
            {"scales": c.scales.tobytes().hex(), "codes": c.codes.tobytes().hex()} for c in contributions()
        ],
        "coefficients": bits(np.array(coefficients)),
        "mu": bits(np.array([MU], np.float32))[0],
        "lr": bits(np.array([LR], np.float32))[0],
        "mean": bits(mean),
        "momentum": bits(momentum),
        "u": bits(u),
        "scales": scales.tobytes().hex(),
        "codes": codes.tobytes().hex(),
        "residual": bits(residual),
        "theta": bits(theta),
        "digest": f"{digest_reference(theta):016x}",
    }


def delayed_steps() -> dict[str, Any]:
    """A window of two, from the same state."""
    theta, momentum, residual = state()
    buffer = np.zeros(64, np.float32)
    coefficients = [np.float32(w / len(DELAYED_WEIGHTS)) for w in DELAYED_WEIGHTS]
    result: dict[str, Any] = {"coefficients": bits(np.array(coefficients))}
    for name, c, weight in zip(("push", "step"), contributions(), coefficients, strict=True):
        part = reference.accumulate(c.format, c.scales, c.codes, float(weight), np.zeros(64, np.float32))
        momentum, buffer, u = reference.delayed_nesterov(part, momentum, buffer, residual, MU, LR, name == "step")
        scales, codes, residual, theta = reference.encode_feedback(Format.INT4, u, theta)
        result[name] = {
            "momentum": bits(momentum),
            "buffer": bits(buffer),
            "u": bits(u),
            "scales": scales.tobytes().hex(),
            "codes": codes.tobytes().hex(),
            "residual": bits(residual),
            "theta": bits(theta),
            "digest": f"{digest_reference(theta):016x}",
        }
    return result


def feedback_before() -> tuple[Floats, Floats]:
    """(residual, round(new) - round(old)) of a worker, float32[64] each."""
    j = np.arange(64)
    return ((j % 5 - 2) / 64).astype(np.float32), (-j / 128).astype(np.float32)


def feedback() -> dict[str, Any]:
    residual, moved = feedback_before()
    x = block() + residual
    e = encoded(Format.INT2, x)
    decoded = reference.decode(Format.INT2, e.scales, e.codes)
    return {
        "encoded": bits(x),
        "scales": e.scales.tobytes().hex(),
        "codes": e.codes.tobytes().hex(),
        "residual": bits(x - decoded),
        "change": bits(moved + decoded + ((x - decoded) - residual)),
    }


def vectors() -> dict[str, Any]:
    return {
        "block": blocks(),
        "frame": frames(),
        "digest": digests(),
        "layout": layouts(),
        "outer": outer_step() | {"delayed": delayed_steps()},
        "feedback": feedback(),
    }


def _lines(value: Any, depth: int = 0) -> Iterable[str]:
    """JSON with one key a line and lists of words wrapped, so that a difference can be read."""
    pad = " " * depth
    if isinstance(value, dict):
        yield "{"
        for i, (key, item) in enumerate(value.items()):
            head, *rest = _lines(item, depth + 1)
            body = [f'{pad} "{key}": {head}', *rest]
            body[-1] += "," if i < len(value) - 1 else ""
            yield from body
        yield pad + "}"
    elif isinstance(value, list) and len(value) > 8 and len(str(value[0])) == 8:
        yield "["
        for i in range(0, len(value), 8):
            row = ", ".join(map(json.dumps, value[i : i + 8]))
            yield f"{pad} {row}" + ("," if i + 8 < len(value) else "")
        yield pad + "]"
    elif isinstance(value, list) and any(len(json.dumps(v)) > 40 for v in value):
        yield "["
        for i, item in enumerate(value):
            yield f"{pad} {json.dumps(item)}" + ("," if i < len(value) - 1 else "")
        yield pad + "]"
    else:
        yield json.dumps(value)


def printed(name: str, values: dict[str, Any]) -> str:
    """The entry `name` of a `vectors` block of the document: a path into `values`, [:n] for its first n words."""
    match = re.fullmatch(r"([\w.]+)(?:\[:(\d+)\])?", name)
    assert match, f"{name!r} is no path"
    value: Any = values
    for key in match[1].split("."):
        value = value[key]
    value = value[: int(match[2])] if match[2] else value
    if isinstance(value, str):
        rows = [value[i : i + 64] for i in range(0, len(value), 64)]
    elif any("\t" in word for word in value):
        rows = [word.replace("\t", r"\t") for word in value]
    else:
        rows = [" ".join(value[i : i + 8]) for i in range(0, len(value), 8)]
    return f"{name} = {rows[0]}" if len(rows) == 1 else "\n  ".join([f"{name} =", *rows])


def fill(document: str, values: dict[str, Any]) -> tuple[str, list[str]]:
    """The document with every entry of its `vectors` blocks printed anew, and the names of the entries."""
    names: list[str] = []

    def block(match: re.Match[str]) -> str:
        entries = re.findall(r"^(\S+) =", match[2], re.MULTILINE)
        names.extend(entries)
        return match[1] + "".join(printed(name, values) + "\n" for name in entries) + match[3]

    return re.sub(r"(```vectors\n)(.*?)(```)", block, document, flags=re.DOTALL), names


if __name__ == "__main__":
    made = vectors()
    PATH.write_text("\n".join(_lines(made)) + "\n")
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), made)[0])
