"""What the hook costs a training step: against the bare loop in the same process, and where the time goes.

    python benchmarks/overhead.py [--layers 7] [--width 512] [--sync-every 100] [--fragments 4] [--overlap 2]
                                  [--periods 5] [--threads N] [--device cpu|cuda] [--json]

A transformer of 25 M parameters on the CPU, AdamW, a batch of 64 tokens; the server is a process of
its own on this machine, and there is one worker. Training has all cores but one, which stands for the processor beside
a GPU: the server and the client's threads run there. The hooked and the bare loop are twins that take turns of H/P
steps, from one merge to the next, so that nothing of the hooked one goes on during the bare one's steps.

With --device cuda no training: capture and apply of a fragment of 100 M parameters in fp32 and bf16 (`--millions`).

With --json the last line is one JSON object. RANGE is one of the client's profiler ranges (diloco::RANGE): capture,
encode, push, wait, decode, apply. On the CPU:

    overhead            hooked over bare, means of the turns, median over the turns, less 1; at most 0.02 is wanted
    in_hook             share of the hooked steps' time that is spent in the hook, waiting left out
    waiting             share of the time that it waits for the network
    worst_step          the slowest hooked step, waiting left out, over the bare median; at most 1.5 is wanted
    worst_bare_step     the slowest bare step over the same
    worst_in_hook       the longest stay in the hook, waiting left out, over the bare median
    capture_of_copy     capture of a fragment against a plain copy of as many bytes; at most 1.5 is wanted
    apply_of_copy       the same of apply
    step_seconds        the bare median
    RANGE_seconds       median of each time
    RANGE_on_trainer    share of the hooked steps' time that the training thread spends in it

On a GPU, DTYPE is float32 or bfloat16:

    capture_DTYPE       speed to the host against a plain copy into pinned memory; at least 0.8 is wanted
    stream_DTYPE        time on the training stream over that of a plain copy on the device
    call_DTYPE          seconds of the training thread
    apply_DTYPE         time on the training stream over that of a plain copy from pinned memory and the merge's own
"""

from __future__ import annotations

import argparse
import json
import os
import statistics

import torch
from common.server import serving
from one_step.copies import DTYPES, bind, on_cpu, on_cuda
from one_step.loop import Clocks, Loop, Steps, take_turns
from one_step.ranges import PHASES, Ranges
from rich.console import Console
from rich.table import Table

import diloco_client

WARM_UP = 3
"""Steps of each loop that are not counted: the optimizers make their states."""


def train(options: argparse.Namespace) -> tuple[Steps, Ranges, dict[str, float]]:
    """The two loops; then the copies."""
    settings = (
        f"--sync-every={options.sync_every}",
        f"--num-fragments={options.fragments}",
        f"--overlap-steps={options.overlap}",
    )
    block = options.sync_every // options.fragments
    hooked, bare = (Loop(options.layers, options.width, options.batch) for _ in range(2))
    for loop in (hooked, bare):
        for _ in range(WARM_UP):
            loop.step()
    ranges = Ranges()
    with serving(*settings) as (server, _), ranges.installed():
        clocks = Clocks(hooked.optimizer)
        with diloco_client.join(server.address, hooked.model, hooked.optimizer) as outer:
            clocks.close()
            take_turns(hooked, bare, clocks, ranges, block, 1)  # memory that nobody has touched yet
            ranges.forget()
            steps = take_turns(hooked, bare, clocks, ranges, block, options.fragments * options.periods)
            outer.close()
    return steps, ranges, on_cpu(bind(bare.model, options.fragments), repeats=11)


def results(steps: Steps, ranges: Ranges, copies: dict[str, float]) -> dict[str, float]:
    usual, all_hooked = statistics.median(steps.bare), sum(steps.hooked)
    found = {
        "overhead": statistics.median(hooked / bare for bare, hooked in steps.blocks) - 1,
        "in_hook": sum(steps.within) / all_hooked,
        "waiting": sum(steps.waited) / (all_hooked + sum(steps.waited)),
        "worst_step": max(steps.hooked) / usual,
        "worst_bare_step": max(steps.bare) / usual,
        "worst_in_hook": max(steps.within) / usual,
        "capture_of_copy": copies["capture"],
        "apply_of_copy": copies["apply"],
        "step_seconds": usual,
    }
    for phase in PHASES:
        found[f"{phase}_seconds"] = statistics.median(ranges.seconds[phase] or [0.0])
        found[f"{phase}_on_trainer"] = ranges.on_trainer[phase] / all_hooked
    return found


def show(found: dict[str, float]) -> None:
    console = Console()
    table = Table("", "", title=f"a bare step takes {found['step_seconds']:.3f} s")
    table.add_row("hooked / bare, less 1", f"{found['overhead']:+.2%}")
    table.add_row("in the hook, of the time", f"{found['in_hook']:.2%}")
    table.add_row("waiting for the network, of the time", f"{found['waiting']:.2%}")
    for title, key in {
        "slowest hooked step / median": "worst_step",
        "slowest bare step / median": "worst_bare_step",
        "longest stay in the hook / median": "worst_in_hook",
        "capture / copy of its bytes": "capture_of_copy",
        "apply / copy of its bytes": "apply_of_copy",
    }.items():
        table.add_row(title, f"{found[key]:.2f}")
    console.print(table)
    table = Table("", "each time, ms", "of the training thread")
    for phase in PHASES:
        table.add_row(phase, f"{1e3 * found[f'{phase}_seconds']:.1f}", f"{found[f'{phase}_on_trainer']:.2%}")
    console.print(table)


def copies_on_gpu(parameters: int, repeats: int) -> dict[str, float]:
    found = {}
    table = Table("", "to host / pinned copy", "on the stream / copy", "call, ms", "apply / copy and merge")
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        its = on_cuda(parameters, dtype, repeats)
        row = (its["capture"], its["stream"], 1e3 * its["call"], its["apply"])
        table.add_row(name, *(f"{value:.2f}" for value in row))
        found |= {f"{key}_{name}": value for key, value in its.items()}
    Console().print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="rows of 64 tokens")
    parser.add_argument("--sync-every", type=int, default=100)
    parser.add_argument("--fragments", type=int, default=4)
    parser.add_argument("--overlap", type=int, default=2)
    parser.add_argument("--periods", type=int, default=5)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="of the training")
    parser.add_argument("--millions", type=float, default=100, help="of parameters, on a GPU")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    if options.sync_every % options.fragments:
        parser.error("--sync-every must be a multiple of --fragments")
    torch.set_num_threads(options.threads)
    # The model learns its few batches by heart. Gradients become denormals then, a step takes up to 1.7 times as long,
    # and the twins, which learn differently, do so at different times.
    torch.set_flush_denormal(True)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU here")
        found = copies_on_gpu(int(options.millions * 1e6), repeats=11)
    else:
        found = results(*train(options))
        show(found)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
