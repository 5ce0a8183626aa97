"""What every format takes on the wire, of real outer gradients and real updates, and whether compressing them pays.

    python benchmarks/wire.py [--json] [--rounds N] [--steps H] [--seed N]

Four workers train the byte-level GPT of the comparison (0.47 M parameters, on the standard library's source) for some
rounds of H steps each, in this process. What is measured, in all but the first round:

- up: the workers' outer gradients in each format. int2 and ternary, which are for that, carry their error along;
- down: the updates that the server makes of these gradients (sent in int4) with Nesterov momentum, in each format that
  updates may have.

Bits a parameter are those of whole frames. The entropy is that of the codes plus that of the scales, each by the
shares of its values in the fragment; of fp32 and bf16, which have too many values to count, that of their bytes by
significance.

The costs are those of compression alone: what `pack_frames` and `read_frame` compute with it less without it, of all
gradients together. Over a link whose rate is under `worth` they take less time than the bytes they save.

With --json the last line is one JSON object; F is a format, keys are there as far as they apply:

    up_F, down_F               bits a parameter
    over_up_F, over_down_F     the share by which these exceed the entropy; at most 0.03 is wanted
    most_over                  the largest of them
    saved_F                    the share of the bytes that compression saves, of the gradients
    worth_F                    Mbit/s, as above
    up_zstd3_F                 bits a parameter with level 3, and how much longer compression takes:
    longer_zstd3_F             a factor
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from common.steps import commit
from comparison.trainer import Texts, build, learning_rate, train_step
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from diloco_proto.codec import (
    BLOCK,
    Encoded,
    Format,
    decode_fragment,
    encode_fragment,
    pack_frames,
    read_frame,
    reference,
)
from diloco_proto.codec.formats import Floats
from diloco_server.config import DOWNLINK
from diloco_server.outer import FragmentState, OuterSettings

WORKERS = 4
WITH_FEEDBACK = (Format.INT2, Format.TERNARY)
DOWN = tuple(Format.from_label(label) for label in DOWNLINK)
WHOLE_RUN = 400
"""Steps of which those made here are the first ones, for the schedule of the learning rate."""

Gradients = list[list[Floats]]
"""By round, then by worker."""


def flat(model: torch.nn.Module) -> Floats:
    """The parameters, each padded to whole blocks."""
    values = [p.detach().numpy().ravel() for p in model.parameters()]
    return np.concatenate([np.pad(v, (0, -v.size % BLOCK)) for v in values])


def load(model: torch.nn.Module, theta: Floats) -> None:
    """The parameters from such values."""
    at = 0
    for parameter in model.parameters():
        parameter.data.copy_(torch.from_numpy(theta[at : at + parameter.numel()]).view_as(parameter))
        at += parameter.numel() + -parameter.numel() % BLOCK


def train(rounds: int, steps: int, seed: int) -> Gradients:
    """The outer gradients of DiLoCo in fp32, P = 1."""
    torch.set_num_threads(1)
    texts = Texts()
    workers = [(*build(seed), texts.shard(i, WORKERS, by_package=False, seed=seed)) for i in range(WORKERS)]
    state = fresh(flat(workers[0][0]))
    gradients: Gradients = []
    for number in range(rounds):
        gradients.append([])
        for model, optimizer, batches in workers:
            load(model, state.theta)
            for step in range(steps):
                train_step(model, optimizer, next(batches), learning_rate((number * steps + step) / WHOLE_RUN))
            gradients[-1].append(state.theta - flat(model))
        step_on(state, [encode_fragment(Format.FP32, g) for g in gradients[-1]], Format.FP32)
    return gradients


def fresh(theta: Floats) -> FragmentState:
    """Before the first outer step."""
    return FragmentState(theta, np.zeros_like(theta), np.zeros_like(theta))


def step_on(state: FragmentState, contributions: list[Encoded], downlink: Format) -> Encoded:
    """The update of one outer step."""
    settings = OuterSettings(optimizer="nesterov", lr=0.7, momentum=0.9, downlink=downlink)
    return commit(state, contributions, [1.0] * len(contributions), settings)


def contributions_of(gradients: Gradients, fmt: Format) -> list[Encoded]:
    """As the workers would send them, but for those of the first round."""
    residuals = [np.zeros_like(g) for g in gradients[0]]
    sent = []
    for each in gradients:
        for worker, gradient in enumerate(each):
            u = gradient + residuals[worker] if fmt in WITH_FEEDBACK else gradient
            sent.append(encode_fragment(fmt, u))
            if fmt in WITH_FEEDBACK:
                residuals[worker] = u - decode_fragment(sent[-1])
    return sent[WORKERS:]


def updates_of(gradients: Gradients, fmt: Format) -> list[Encoded]:
    """As the server would publish them, but for the first."""
    state = fresh(np.zeros_like(gradients[0][0]))
    return [step_on(state, [encode_fragment(Format.INT4, g) for g in each], fmt) for each in gradients][1:]


def entropy(symbols: NDArray[np.uint8]) -> float:
    """Bits a symbol."""
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / symbols.size
    return float(-(shares * np.log2(shares)).sum())


def bits_at_least(encoded: Encoded) -> float:
    """The entropy, in bits a parameter."""
    fmt = encoded.format
    if not fmt.spec.scale_bytes:
        width = fmt.spec.code_bytes // BLOCK
        return sum(entropy(encoded.codes[i::width]) for i in range(width))
    codes = reference.unpack(fmt, encoded.codes).ravel().astype(np.uint8)
    return entropy(codes) + entropy(encoded.scales) / BLOCK


def bits(encoded: list[Encoded], level: int | None = 1) -> float:
    """Bits a parameter of all frames."""
    size = sum(len(frame) for each in encoded for frame in pack_frames(each, level=level))
    return 8 * size / (BLOCK * sum(e.num_blocks for e in encoded))


def compare(encoded: list[Encoded]) -> tuple[float, float]:
    """Bits a parameter, and by which share they exceed the entropy."""
    taken, least = bits(encoded), float(np.mean([bits_at_least(e) for e in encoded]))
    return taken, taken / least - 1


@dataclass(frozen=True)
class Cost:
    """Of compressing at one level: seconds and bits a parameter."""

    pack: float
    read: float
    bits: float


def cost(encoded: Encoded, level: int | None) -> Cost:
    """The least of some tries."""
    frames = pack_frames(encoded, level=level)
    count = encoded.num_blocks * BLOCK
    pack = shortest(lambda: pack_frames(encoded, level=level)) / count
    read = shortest(lambda: [read_frame(frame) for frame in frames]) / count
    return Cost(pack, read, 8 * sum(map(len, frames)) / count)


def shortest(work: Callable[[], object], times: int = 9) -> float:
    """Seconds of computing."""
    taken = []
    for _ in range(times):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return min(taken)


def joined(parts: list[Encoded]) -> Encoded:
    """One after the other, as a larger model's."""
    return Encoded(parts[0].format, np.concatenate([p.scales for p in parts]), np.concatenate([p.codes for p in parts]))


def measure(gradients: Gradients) -> dict[str, float]:
    """All keys of the docstring."""
    found: dict[str, float] = {}
    for fmt in Format:
        sent, name = contributions_of(gradients, fmt), fmt.label
        found[f"up_{name}"], found[f"over_up_{name}"] = compare(sent)
        if fmt in DOWN:
            found[f"down_{name}"], found[f"over_down_{name}"] = compare(updates_of(gradients, fmt))
        whole = joined(sent)
        stored, ours, third = (cost(whole, level) for level in (None, 1, 3))
        seconds = ours.pack - stored.pack + ours.read - stored.read
        found[f"saved_{name}"] = 1 - ours.bits / stored.bits
        found[f"worth_{name}"] = (stored.bits - ours.bits) / seconds / 1e6
        found[f"up_zstd3_{name}"] = third.bits
        found[f"longer_zstd3_{name}"] = (third.pack - stored.pack) / (ours.pack - stored.pack)
    found["most_over"] = max(v for k, v in found.items() if k.startswith("over_"))
    return {key: round(value, 4) for key, value in found.items()}


def show(found: dict[str, float]) -> None:
    headings = ("up", "over entropy", "down", "over entropy", "saved", "worth, Mbit/s", "with zstd 3", "takes")
    table = Table("format", *headings, title="bits a parameter of real outer gradients")

    def cell(key: str, layout: str) -> str:
        return layout.format(found[key]) if key in found else ""

    for fmt in Format:
        name = fmt.label
        table.add_row(
            name,
            cell(f"up_{name}", "{:.3f}"),
            cell(f"over_up_{name}", "{:+.1%}"),
            cell(f"down_{name}", "{:.3f}"),
            cell(f"over_down_{name}", "{:+.1%}"),
            cell(f"saved_{name}", "{:.0%}"),
            cell(f"worth_{name}", "{:.0f}"),
            cell(f"up_zstd3_{name}", "{:.3f}"),
            cell(f"longer_zstd3_{name}", "× {:.1f}"),
        )
    Console(width=100).print(table)


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help="inner steps a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    found = measure(train(options.rounds, options.steps, options.seed))
    show(found)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
