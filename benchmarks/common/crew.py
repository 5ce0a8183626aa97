"""Processes that do the same thing at the same time, again and again, and say when each began and ended."""

from __future__ import annotations

import multiprocessing as mp
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

PATIENCE = 600.0
"""Seconds for the slowest of them to come to the next barrier."""


@dataclass
class Member:
    """What one process of a crew has at hand."""

    index: int
    count: int
    barrier: Any
    spans: list[tuple[float, float]] = field(default_factory=list)
    """When each round began and ended for it, on the clock that all processes share."""
    notes: list[Any] = field(default_factory=list)
    """What else it has to tell."""

    def begin(self) -> None:
        """Wait for the others; the round begins."""
        self.barrier.wait(PATIENCE)
        self._began = time.monotonic()

    def end(self) -> None:
        self.spans.append((self._began, time.monotonic()))


def run_crew(count: int, body: Callable[..., None], *arguments: object) -> list[float]:
    """`body(member, *arguments)` in so many processes; returns the seconds of each round, from the moment that all had
    come to it until the last one was done. Raises RuntimeError with what went wrong in one of them."""
    return seconds_of(run_members(count, body, *arguments))


def seconds_of(members: list[Member]) -> list[float]:
    """Of each round."""
    rounds = zip(*(member.spans for member in members), strict=True)
    return [max(end for _, end in spans) - max(begin for begin, _ in spans) for spans in rounds]


def run_members(count: int, body: Callable[..., None], *arguments: object) -> list[Member]:
    """The same; returns the members with their spans and notes, in order."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "numba"])  # seconds of import otherwise, for each process
    barrier = context.Barrier(count)
    processes, answers = [], []
    for i in range(count):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(Member(i, count, barrier), theirs, body, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        answers.append(ours)
    try:
        return _gather(answers)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _gather(answers: list[Connection]) -> list[Member]:
    """Raises RuntimeError with what went wrong in one of them, or when one has ended without a word."""
    members = [Member(i, len(answers), None) for i in range(len(answers))]
    left = dict(zip(answers, members, strict=True))
    while left:
        for answer in wait(list(left)):
            member = left.pop(answer)  # type: ignore[call-overload]
            try:
                found = answer.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"process {member.index} has ended without an answer") from None
            if isinstance(found, str):
                raise RuntimeError(found)
            member.spans, member.notes = found
    return members


def _main(member: Member, answer: Connection, body: Callable[..., None], arguments: tuple[object, ...]) -> None:
    try:
        body(member, *arguments)
        answer.send((member.spans, member.notes))
    except BaseException:
        answer.send(f"process {member.index}: {traceback.format_exc()}")
    os._exit(0)


def end_with(parent: Connection) -> None:
    """End this process when its parent, at the other end of the pipe, has ended, however that was."""

    def watch() -> None:
        parent.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def typical(seconds: list[float]) -> float:
    """The median without the first, which pays for memory that nobody has touched yet."""
    return statistics.median(seconds[1:])
