"""The global parameters that a worker begins with: its own, which become the run's, or those that the run has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import digest

from .binding import Binding
from .captured import Captured
from .courier import Courier
from .flights import Base
from .messages import seed_push
from .transport import Transport

T = TypeVar("T")

log = logging.getLogger("diloco")


class Doing(Protocol):
    def __call__(self, work: Callable[[], T], /) -> T:
        """The result of what waits for the network or may fail."""
        ...


class First:
    """For the run that `courier` was set up for."""

    def __init__(
        self, transport: Transport, binding: Binding, courier: Courier, identity: Callable[[], pb.PushHeader], do: Doing
    ) -> None:
        self._transport = transport
        self._binding = binding
        self._courier = courier
        self._identity = identity
        self._do = do

    def seed(self) -> list[Base]:
        """Make this worker's parameters version 0 of the run, fragment by fragment."""
        run_id = self._courier.run_id
        log.info("seeding run %s with this worker's parameters", run_id)
        bases = []
        for fragment in range(len(self._binding.layout.fragments)):
            local = self._binding.capture(fragment)
            bases.append(self._do(partial(self._seed, run_id, fragment, local)))
        return bases

    def base(self, fragment: int, now: pb.FragmentVersion | None, seed: Base | None) -> Base:
        """What the run has: what this worker has seeded, if nothing has changed since, else fetched."""
        if seed is not None and now is not None and now.version == 0 and self._is(seed, fragment, now.digest):
            return seed
        return self._fetch(fragment)

    def _seed(self, run_id: str, fragment: int, local: Captured) -> Base:
        theta = self._binding.seed_values(fragment, local)
        identity = self._identity()
        identity.run_id = run_id
        self._transport.push(*seed_push(identity, self._binding.spans[fragment], theta))
        return Base(0, theta)

    def _is(self, base: Base, fragment: int, whole: int) -> bool:
        """Whether the whole fragment has this digest."""
        return digest(base.theta) == whole

    def _fetch(self, fragment: int) -> Base:
        return self._courier.fetch(fragment, None, self._courier.run_id)
