"""Meetings of an island's ranks: what each of them has to say, told to all at the same point of the training.

Only the leader has a session with the server. What it brings is put into the leader's word and taken in by all ranks,
the leader too, in the same order; so every rank knows the same at the same step and decides the same, and nobody but
the training thread changes what a rank knows of the run. Of the others each word has what its transfers have come to,
and what its trainer reports.
"""

from __future__ import annotations

import base64
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from diloco_proto.errors import DilocoError

from .ranks import Island, heard, tell

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05
"""Seconds between two meetings while a rank waits; they grow as long as nobody has news."""

Word = Mapping[str, Any]
"""What a rank says, by topic; of what JSON can say."""


class Speaker(Protocol):
    """Has something to say at meetings, and hears what all say."""

    def say(self) -> dict[str, Any]:
        """By topic; nothing for no news."""
        ...

    def hear(self, words: Sequence[Word]) -> None:
        """What every rank says, by rank."""
        ...


class Council:
    """One rank's seat. Every rank meets as often as all others."""

    def __init__(self, island: Island) -> None:
        self.island = island
        self.log = logging.getLogger("diloco")
        """For what concerns the whole worker: of all ranks the first says it."""
        if not island.leads:
            self.log = logging.Logger("diloco")
            self.log.disabled = True
        self.clock = 0.0
        """The leader's, in seconds, as of the last meeting: what depends on time goes by it, so that all agree."""
        self._speakers: list[Speaker] = []
        self._events: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._error: DilocoError | None = None
        self._fatal: DilocoError | None = None
        self._wake = threading.Event()
        self._pause = FIRST_PAUSE

    def seat(self, speaker: Speaker) -> None:
        """From now on it is heard, after those that are already."""
        self._speakers.append(speaker)

    def unseat(self, speaker: Speaker) -> None:
        if speaker in self._speakers:
            self._speakers.remove(speaker)

    # -- any thread --

    def event(self, kind: str, body: bytes = b"") -> None:
        """The leader's session brings something: for the next meeting."""
        self._events.put((kind, body))
        self._wake.set()

    def fail(self, error: DilocoError) -> None:
        """This rank cannot go on, and so no rank can: from the next meeting on it is raised on all."""
        self._error = self._error or error
        self._wake.set()

    def news(self) -> None:
        """There is something to say: a rank that waits need not wait any longer."""
        self._wake.set()

    # -- training thread --

    def meet(self, about: str, *, busy: bool = False) -> bool:
        """Tell, and hear, what is new; whether any rank is `busy`. `about` is why the ranks meet, a word of up to 8
        letters. Raises the error of any rank, on all of them, and IslandBroken."""
        self.raise_fatal()
        said = json.dumps(self._word(busy)).encode()
        words: list[Word] = [json.loads(word) for word in self.island.exchange(said, about)]
        self.clock = words[0]["clock"]
        told = next((word["error"] for word in words if "error" in word), None)
        if told is not None:
            self._fatal = self._error if self._error is not None and tell(self._error) == told else heard(told)
            self.raise_fatal()
        if any(word.keys() - {"clock", "busy"} for word in words):
            self._pause = FIRST_PAUSE
            for speaker in list(self._speakers):
                speaker.hear(words)
        return any("busy" in word for word in words)

    def _word(self, busy: bool) -> dict[str, Any]:
        word: dict[str, Any] = {}
        if self.island.leads:
            word["clock"] = time.monotonic()
            events = []
            while not self._events.empty():
                kind, body = self._events.get()
                events.append((kind, base64.b64encode(body).decode()))
            if events:
                word["events"] = events
        if busy:
            word["busy"] = True
        if self._error is not None:
            word["error"] = tell(self._error)
        for speaker in self._speakers:
            word.update(speaker.say())
        return word

    def raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal.with_traceback(None) from None

    def rest(self) -> None:
        """Between two meetings of ranks that wait; ends early with news of this rank."""
        self._wake.wait(self._pause)
        self._wake.clear()
        self._pause = min(LONGEST_PAUSE, 1.5 * self._pause)

    def wait(self, condition: Callable[[], bool], give_up: Callable[[], bool] = lambda: False) -> bool:
        """Meet until `condition` is so; False if `give_up` is so before. Both must go by what all ranks know."""
        while not condition():
            if give_up():
                return False
            self.rest()
            self.meet("waiting")
        return True


def events_of(words: Sequence[Word]) -> list[tuple[str, bytes]]:
    """What the leader's session has brought."""
    return [(kind, base64.b64decode(body)) for kind, body in words[0].get("events", ())]
