"""Reading the journal again: to the last record that counts, and not one that was damaged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from . import segment
from . import state_pb2 as pb
from .errors import CorruptJournal, StorageFailed, explain
from .files import File, Files
from .segment import BARRIER, HEADER_BYTES, JOURNAL, Header

log = logging.getLogger("diloco.server")

NO_JOURNAL = 0
"""`first_segment` of a snapshot that no journal goes with."""

_COPY = 1 << 20


@dataclass(frozen=True, slots=True)
class Last:
    """Where the journal ends."""

    number: int
    """Of the last segment; 0 if there is none."""
    end: int
    """The bytes of it that count."""


Replayed = tuple[int, pb.Record, memoryview]
"""Segment, record and blob."""


class Replay:
    """One reading. Iterate to the end, which makes the tail fit to go on from; then ask for `last`.

    A journal in another `directory` was put aside: it is read and left as it is.
    """

    def __init__(self, files: Files, from_segment: int, directory: str = JOURNAL) -> None:
        self._files = files
        self._from = from_segment
        self._directory = directory
        self.last: Last | None = None

    def __iter__(self) -> Iterator[Replayed]:
        """Raises CorruptJournal or StorageFailed."""
        try:
            yield from self._records()
        except OSError as error:
            raise StorageFailed(explain(f"read the journal in {self._files.root}", error)) from error

    def _records(self) -> Iterator[Replayed]:
        numbers = segment.numbers(self._files, self._directory)
        if self._from == NO_JOURNAL:
            # The next number leaves a gap: nothing may take what comes for what followed these.
            self.last = Last(numbers[-1] + 1 if numbers else 0, 0)
            return
        wanted = [n for n in numbers if n >= self._from]
        found = [self._header(number, is_last=number == wanted[-1]) for number in wanted]
        headers = [header for header in found if header is not None]
        self._check_complete([header.number for header in headers])
        end = 0
        for header, following in zip_longest(headers, headers[1:]):
            with contextlib.closing(self._files.open(self._path(header.number))) as file:
                end = yield from self._segment(file, header, following)
        self.last = Last(headers[-1].number if headers else 0, end)

    def _header(self, number: int, is_last: bool) -> Header | None:
        path = self._path(number)
        with contextlib.closing(self._files.open(path)) as file:
            size, header = file.size(), Header.unpack(file.read(0, HEADER_BYTES), number)
        if header is None:
            if not is_last or size > HEADER_BYTES:
                raise self._corrupt(path, 0, "the head of the segment does not verify")
            if self._directory != JOURNAL:
                return None
            log.warning("%s was just being made and held nothing yet: removed", self._files.root / path)
            self._files.remove(path)
        return header

    def _check_complete(self, numbers: list[int]) -> None:
        if not numbers and self._from == 1:
            return  # it was never begun
        for expected, number in enumerate(numbers or [0], self._from):
            if number != expected:
                raise self._corrupt(self._path(expected), 0, "the file is missing")

    def _segment(self, file: File, header: Header, following: Header | None) -> Generator[Replayed, None, int]:
        """Its records; and where they end."""
        end = following.previous_end if following else file.size()
        offset, unsure = HEADER_BYTES, 0
        while offset < end:
            entry = segment.read_entry(file, header, offset, end)
            if entry is None:
                self._check_tail(file, header, offset, following)
                break
            if entry.kind == BARRIER:
                unsure = offset
            else:
                yield header.number, pb.Record.FromString(entry.message), entry.blob
            offset = entry.end
        if following is None and self._directory == JOURNAL:
            self._settle(file, header, unsure, offset)
        return offset

    def _check_tail(self, file: File, header: Header, offset: int, following: Header | None) -> None:
        """Raises CorruptJournal if what does not verify at `offset` had been on disk."""
        path = self._path(header.number)
        if following is not None:
            raise self._corrupt(path, offset, "a record does not verify, and later segments follow")
        barrier = segment.find_barrier(file, header, offset, file.size())
        if barrier is not None:
            raise self._corrupt(path, offset, f"a record does not verify, and all before byte {barrier} was on disk")

    def _settle(self, file: File, header: Header, unsure: int, end: int) -> None:
        """Cut off what lies beyond `end`, and see to it that what was read is on disk: it may have been in memory only.

        From `unsure` on it is written again: after a sync that failed the system takes for written what is not.
        """
        size = file.size()
        if end < size:
            path = self._files.root / self._path(header.number)
            log.warning("%s: cut off the last %d bytes, which were never acknowledged", path, size - end)
            file.truncate(end)
        for offset in range(unsure, end, _COPY):
            file.write(offset, [file.read(offset, min(_COPY, end - offset))])
        file.sync()
        self._files.sync_dir("journal")

    def _path(self, number: int) -> str:
        return segment.path_of(number, self._directory)

    def _corrupt(self, path: str, offset: int, what: str) -> CorruptJournal:
        return CorruptJournal(
            f"{self._files.root / path} is damaged at byte {offset}: {what}. Put back a copy of the file, or give up "
            "what came after a snapshot: start with --rollback and its version"
        )
