"""Who watches a simulated run. A Watch sees all that matters and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diloco_client.flights import Arrival, Base, Flight
from diloco_proto import outer_pb2 as pb
from diloco_server.model import Committed

if TYPE_CHECKING:
    from .link import VirtualLink
    from .revival import Revived


class Watch:
    """Is told of everything; does nothing. Others override what they care for."""

    def count(self, kind: str) -> None:
        """An event of this kind has been handled."""

    # -- on the server --

    def attached(self, worker_id: str, generation: int) -> None:
        """A hello was accepted."""

    def heard(self, worker_id: str, generation: int, request: pb.SessionRequest) -> None:
        """A message of a session was accepted."""

    def cut(self, worker_id: str) -> None:
        """The server saw a session's connection break."""

    def answered(self, header: pb.PushHeader, outcome: pb.Outcome) -> None:
        """A push got its outcome."""

    def acknowledged(self, header: pb.PushHeader, outcome: pb.Outcome) -> None:
        """The outcome is on disk, and goes to the worker."""

    def admitted(self, header: pb.PushHeader) -> None:
        """A push was let in, or got its outcome."""

    def committed(self, committed: Committed) -> None:
        """An outer step was computed; it is published next."""

    def settled(self) -> None:
        """The server has dealt with what happened."""

    def stood_still(self, seconds: float) -> None:
        """The server was stopped for so long."""

    def restarted(self, revived: Revived) -> None:
        """The server died, and goes on with this run."""

    # -- in a worker --

    def pushed(self, link: VirtualLink, flight: Flight, headers: list[pb.PushHeader]) -> None:
        """A contribution begins its way."""

    def arrived(self, link: VirtualLink, fragment: int, base: Base) -> None:
        """A newer base is here."""

    def took(self, link: VirtualLink, fragment: int, old: Base, arrival: Arrival) -> None:
        """A newer base is about to be merged."""

    def met(self, link: VirtualLink) -> None:
        """The worker has flushed together with all others, and holds the global parameters."""

    def failed_with(self, link: VirtualLink) -> None:
        """The worker has got an error that ends it."""
