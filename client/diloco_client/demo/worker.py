"""One training process of the demo: a worker of the run, or the lone worker it is compared with.

    python -m diloco_client.demo.worker '{"name": "worker-0", …}'

On stdout it tells events, one JSON object a line. On stdin it is told the server's address (an empty line for
the lone worker), then `go`. When stdin closes the parent is gone, and the process ends at once.
"""

import dataclasses
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diloco_client
from diloco_client.demo import corpus
from diloco_client.demo.model import ByteGPT, ModelConfig, count_parameters

BATCH = 8
"""Windows a step. Small, so that the gradient is noisy and there is something to gain from more workers."""
CONTEXT = 64
"""Bytes a window."""
LEARNING_RATE = 3e-3
"""Peak of the inner AdamW: of 2, 3 and 4 e-3 the best for the lone worker, and for the others too."""
WARMUP_STEPS = 30
FINAL_LEARNING_RATE = 0.1
"""Share of the peak that is left at the last step."""
CURVE_POINTS = 8
"""How often the validation loss is taken on the way."""
VALIDATION_WINDOWS = 768
"""Validation windows, the same ones for every loss in the report, all workers together."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What one process has to do."""

    name: str
    index: int
    """Which shard is its own."""
    alone: bool
    workers: int
    steps: int
    seed: int


Report = Callable[[int, float], None]
"""Called with the step and its training loss."""


class Parent:
    """The two pipes to the process that started this one."""

    def __init__(self) -> None:
        self._events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no event: off to the log
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="parent").start()

    def _read(self) -> None:
        # Unbuffered: a daemon thread inside sys.stdin's buffer would make the interpreter abort when it ends.
        pending = b""
        while chunk := os.read(sys.stdin.fileno(), 4096):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._lines.put(line.decode())
        os._exit(1)  # the parent is gone: nobody is left to report to, or to clean up after us

    def receive(self) -> str:
        """The next line the parent sends."""
        return self._lines.get()

    def send(self, event: str, **fields: Any) -> None:
        """One event to the parent."""
        self._events.write(json.dumps({"event": event, **fields}) + "\n")
        self._events.flush()


class Evaluator:
    """Validation loss of any state dict, on this process' part of the validation windows."""

    def __init__(self, task: Task, files: Sequence[Path]) -> None:
        self._model = ByteGPT(ModelConfig(context=CONTEXT))
        data = corpus.read_bytes(files)
        # The workers share the windows out, so that evaluating θ holds none of them up more than the others;
        # the parent takes the mean. The lone worker has all of them to itself.
        part = slice(None) if task.alone else slice(task.index, None, task.workers)
        tokens, targets = corpus.spread(data, size=VALIDATION_WINDOWS, context=CONTEXT)
        self._tokens, self._targets = tokens[part], targets[part]

    @torch.no_grad()
    def loss(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean loss in nats a byte over this process' part of the windows, and how many windows that is."""
        self._model.load_state_dict(state)
        total = 0.0
        # Few at a time: the activations stay in the processor's cache.
        for x, y in zip(torch.split(self._tokens, 64), torch.split(self._targets, 64), strict=True):
            total += self._model(x, y).item() * len(x)
        return {"loss": total / len(self._tokens), "windows": len(self._tokens)}


def learning_rate(step: int, steps: int) -> float:
    """Inner learning rate at `step` in 1 … `steps`: linear warm-up, then a cosine to a tenth of the peak."""
    warmup = min(WARMUP_STEPS, max(1, steps // 4))
    if step <= warmup:
        return LEARNING_RATE * step / warmup
    done = (step - warmup) / (steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return LEARNING_RATE * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def build(seed: int) -> tuple[ByteGPT, torch.optim.Optimizer]:
    """The model, with the same initial weights in every process of one demo, and its inner optimizer."""
    torch.manual_seed(seed)
    model = ByteGPT(ModelConfig(context=CONTEXT))
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)


def train(
    task: Task,
    model: ByteGPT,
    optimizer: torch.optim.Optimizer,
    data: Iterator[tuple[Tensor, Tensor]],
    report: Report,
) -> None:
    """The training loop, the same for a worker and for the lone worker; a joined run hooks `optimizer.step`.

    Calls `report(step, loss)` after every step.
    """
    for step in range(1, task.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, task.steps)
        tokens, targets = next(data)
        loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss.item())


class Alone:
    """The lone worker: its own parameters are all there is, and nothing travels."""

    def __init__(self, model: ByteGPT) -> None:
        self._model = model

    def state(self) -> Mapping[str, Tensor]:
        """The parameters whose validation loss counts."""
        return self._model.state_dict()

    def traffic(self) -> dict[str, float]:
        """Seconds stalled and bytes moved since the start."""
        return {"stall": 0.0, "up": 0, "down": 0}

    def finish(self) -> dict[str, Any]:
        """Ends the training; figures that exist only then."""
        return {"digests": {}, "bits_up": 0.0, "bits_down": 0.0}


class Joined:
    """A worker of the run: what counts is θ."""

    def __init__(self, outer: diloco_client.Outer) -> None:
        self._outer = outer

    def state(self) -> Mapping[str, Tensor]:
        """θ as this worker knows it."""
        return self._outer.global_state_dict()

    def traffic(self) -> dict[str, float]:
        """Seconds stalled and bytes moved since the start, the first download included."""
        stats = self._outer.stats
        return {"stall": stats.stall_seconds, "up": stats.bytes_up, "down": stats.bytes_down}

    def finish(self) -> dict[str, Any]:
        """Hands in what is left and waits for the others; the digests of θ, the bits a parameter and sync."""
        self._outer.flush(together=True)
        stats = self._outer.stats
        digests = {str(index): f"{digest:#018x}" for index, digest in self._outer.base_digests().items()}
        return {"digests": digests, "bits_up": stats.bits_up, "bits_down": stats.bits_down}


def reporter(task: Task, parent: Parent, evaluator: Evaluator, side: Alone | Joined) -> Report:
    """What tells the parent of every step, and now and then of the validation loss."""
    every = max(1, task.steps // CURVE_POINTS)
    started = time.monotonic()

    def report(step: int, loss: float) -> None:
        parent.send("step", step=step, loss=loss, seconds=time.monotonic() - started, **side.traffic())
        if step % every == 0:
            parent.send("curve", step=step, **evaluator.loss(side.state()))

    return report


def take_part(task: Task, parent: Parent) -> None:
    """Everything from loading the text to the last figures, told to the parent."""
    text = corpus.divide(corpus.standard_library(), task.workers)
    shard = corpus.read_bytes(text.shards[task.index])
    data = corpus.batches(shard, size=BATCH, context=CONTEXT, seed=task.seed * 1000 + task.index)
    evaluator = Evaluator(task, text.validation)
    model, optimizer = build(task.seed)
    if not task.alone:  # the same model everywhere: the workers' parts are enough
        loss = evaluator.loss(model.state_dict())
        parent.send("initial", parameters=count_parameters(model), **loss)
    address = parent.receive()
    with ExitStack() as stack:
        side: Alone | Joined = Alone(model)
        if not task.alone:
            outer = diloco_client.join(address, model, optimizer, worker_id=task.name)
            side = Joined(stack.enter_context(outer))
        parent.send("ready")
        parent.receive()
        started = time.monotonic()
        train(task, model, optimizer, data, reporter(task, parent, evaluator, side))
        # Taken before the end: waiting for the slowest worker's last step is no stall of the training.
        trained = {"seconds": time.monotonic() - started, "stall": side.traffic()["stall"]}
        finished = side.finish()
        final = evaluator.loss(side.state())
        parent.send("done", **side.traffic() | trained | finished | final)


def main() -> None:
    """Entry point of the process."""
    torch.set_num_threads(1)  # several of these share the machine's cores
    take_part(Task(**json.loads(sys.argv[1])), Parent())


if __name__ == "__main__":
    main()
