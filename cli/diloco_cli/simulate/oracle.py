"""Every outer step computed anew, from the contributions alone, in plain numpy (promises 1 and 2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Encoded, Format, UnencodableValue, digest, pack_frames, reference
from diloco_proto.codec.formats import Bytes, Floats
from diloco_proto.manifest import Fragment, Role
from diloco_server.config import DELAYED, RunConfig
from diloco_server.model import Committed

from .broken import BrokenPromise
from .ledger import Pushed


class Oracle:
    """The global parameters of one fragment as they must be, from version 0 on."""

    def __init__(self, config: RunConfig, fragment: Fragment, theta: Floats) -> None:
        buffers = fragment.role is Role.BUFFER
        self.theta = theta.copy()
        self.history = [self.theta.tobytes()]
        """theta of each version."""
        self._config = config
        self._fragment = fragment.index
        self._delayed = config.outer_optimizer == DELAYED
        self._buffers = buffers
        self._format = Format.FP32 if buffers else config.downlink
        self._lr = 1.0 if buffers else config.outer_lr
        self._sgd = buffers or config.outer_optimizer == "sgd"
        self._momentum = np.zeros_like(theta)
        self._residual = np.zeros_like(theta)
        self._buffer = np.zeros_like(theta)
        self._window, self._in_window = 1, 0
        self._norms: deque[float] = deque(maxlen=64)
        self._works: deque[int] = deque(maxlen=64)
        self._sizes: deque[float] = deque(maxlen=64)
        self._updates: list[list[bytes]] = [[]]
        """The frames that led to each version."""
        self._past = [self._state()]

    def check(self, committed: Committed, entered: Sequence[Pushed], live: int) -> None:
        """A step was made of these contributions (none: they overflow). `live`: workers when it was decided."""
        ordered = sorted(entered, key=lambda p: p.worker_id)
        if committed.close.contributions:
            shares = self._shares(ordered, committed.close.base_version, live)
            scales, codes = self._step(ordered, shares)
        else:
            blank = Encoded(self._format, *reference.encode(self._format, np.zeros_like(self.theta)))
            scales, codes = blank.scales, blank.codes
        expected = pack_frames(Encoded(self._format, scales, codes))
        published = [pb.PullReply.FromString(m).frame for m in committed.update.messages]
        if published != expected:
            raise BrokenPromise(2, "the update is not what its contributions make", fragment=self._fragment)
        if committed.update.digest != digest(self.theta):
            raise BrokenPromise(1, "the server's parameters are not what it publishes", fragment=self._fragment)
        self.history.append(self.theta.tobytes())
        self._updates.append(expected)
        self._past.append(self._state())

    def check_again(self, committed: Committed) -> None:
        """A step that was made before was made again, after a restart."""
        published = [pb.PullReply.FromString(m).frame for m in committed.update.messages]
        if published != self._updates[committed.update.version]:
            text = f"version {committed.update.version}, made again, is not the one that was published"
            raise BrokenPromise(1, text, fragment=self._fragment)

    def check_state(self, version: int, theta: Floats) -> None:
        """The server is back at this version."""
        newest = len(self.history) - 1
        if version != newest:
            text = f"version {newest} was published, and after a restart the server is at {version}"
            raise BrokenPromise(3, text, fragment=self._fragment)
        if theta.tobytes() != self.history[version]:
            text = "after a restart the server's parameters are not what it published"
            raise BrokenPromise(1, text, fragment=self._fragment)

    def go_back(self, version: int) -> None:
        """The versions after this one are undone."""
        del self.history[version + 1 :], self._updates[version + 1 :], self._past[version + 1 :]
        (
            self.theta,
            self._momentum,
            self._residual,
            self._buffer,
            self._window,
            self._in_window,
            norms,
            works,
            sizes,
        ) = self._past[version]
        for series, values in ((self._norms, norms), (self._works, works), (self._sizes, sizes)):
            series.clear()
            series.extend(values)

    def _state(self) -> tuple[Any, ...]:
        """All that the next step depends on; arrays are never changed in place."""
        series = tuple(self._norms), tuple(self._works), tuple(self._sizes)
        return self.theta, self._momentum, self._residual, self._buffer, self._window, self._in_window, *series

    def _shares(self, members: Sequence[Pushed], version: int, live: int) -> list[np.float32]:
        """The coefficient of each contribution."""
        config = self._config
        norms = [float(np.sqrt(np.sum(p.decoded.astype(np.float64) ** 2))) for p in members]
        known = [n for n in (*self._norms, *norms) if n > 0]
        limit = config.max_outer_grad_norm * median(known) if config.max_outer_grad_norm and known else np.inf
        limit = np.inf if self._buffers else limit
        work = median([*self._works, *(p.tokens for p in members)])
        limits = [limit * max(1.0, p.tokens / work) for p in members]
        scales = [1.0 if n <= most else most / n for n, most in zip(norms, limits, strict=True)]
        self._works.extend(p.tokens for p in members)
        self._norms.extend(n * s for n, s in zip(norms, scales, strict=True))
        tokens = [1.0 if config.weighting == "uniform" else float(p.tokens) for p in members]
        if not self._delayed:
            weights = [min(t, 2 * median(tokens)) for t in tokens]
            return [np.float32(s * w / sum(weights)) for s, w in zip(scales, weights, strict=True)]
        self._sizes.append(tokens[0] / (1 + max(0, version - members[0].since_version)) ** 0.5)
        weight = min(2.0, self._sizes[-1] / median(self._sizes))
        if self._buffers:
            return [np.float32(1 / 3 * scales[0] * weight / live)]
        self._window = self._window if self._in_window else live
        return [np.float32(scales[0] * weight / self._window)]

    def _step(self, members: Sequence[Pushed], shares: Sequence[np.float32]) -> tuple[Bytes, Bytes]:
        g = np.zeros_like(self.theta)
        for pushed, share in zip(members, shares, strict=True):
            g = g + share * pushed.decoded
        mu, lr = self._config.outer_momentum, self._lr
        if self._sgd:
            u = reference.sgd(g, self._residual, lr)
        elif self._delayed:
            self._in_window = (self._in_window + 1) % self._window
            self._momentum, self._buffer, u = reference.delayed_nesterov(
                g, self._momentum, self._buffer, self._residual, mu, lr, last=self._in_window == 0
            )
        else:
            self._momentum, u = reference.nesterov(g, self._momentum, self._residual, mu, lr)
        if reference.first_refused(u) >= 0:
            raise UnencodableValue(reference.first_refused(u))
        scales, codes, self._residual, self.theta = reference.encode_feedback(self._format, u, self.theta)
        return scales, codes
