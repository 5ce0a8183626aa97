"""Where version 0 comes from: one live worker's parameters, or a file."""

from __future__ import annotations

from collections.abc import Sequence

from diloco_proto.errors import NonFiniteParameter
from diloco_proto.manifest import Layout, Manifest

from .checkpoint import InitialParameters
from .members import Member
from .parameters import Parameters, Seed, prepare_seed


class Seeding:
    """Which worker gives the parameters, and which fragments have come."""

    def __init__(self, layout: Layout, parameters: Parameters) -> None:
        self._parameters = parameters
        self._all = frozenset(range(len(layout.fragments)))
        self._missing = set(self._all)
        self._seeder: tuple[str, int] | None = None

    @property
    def done(self) -> bool:
        return not self._missing

    def is_seeder(self, worker_id: str, generation: int) -> bool:
        return self._seeder == (worker_id, generation)

    def appoint(self, live: Sequence[Member], arrived: Member | None) -> tuple[Member | None, bool]:
        """The worker to be asked now, if any, and whether it starts from nothing.

        Another one if the former is gone; the same again if it has just `arrived` anew. Another process holds other
        parameters, and nothing of its predecessor's may be mixed with them.
        """
        if self.done or not live:
            return None, False
        seeder = next((m for m in live if self._seeder and m.worker_id == self._seeder[0]), None)
        if seeder is not None and seeder is not arrived:
            return None, False
        seeder = seeder or live[0]
        afresh = not self.is_seeder(seeder.worker_id, seeder.generation)
        if afresh:
            self._seeder = (seeder.worker_id, seeder.generation)
            self._missing = set(self._all)
        return seeder, afresh

    def restored(self) -> None:
        """The parameters come from the server's own disk."""
        self._missing.clear()

    def take(self, fragment: int, seed: Seed) -> None:
        """One fragment has come."""
        self._parameters.seed(fragment, seed)
        self._missing.discard(fragment)

    def from_file(self, init: InitialParameters, manifest: Manifest, layout: Layout) -> None:
        """All fragments, from the server's `--init`. Raises ManifestMismatch or NonFiniteParameter."""
        init.check(manifest)
        for fragment in layout.fragments:
            try:
                self.take(fragment.index, prepare_seed(fragment, init.flat(fragment)))
            except NonFiniteParameter as error:
                raise NonFiniteParameter(f"the server's --init {init.path}: {error}") from error
