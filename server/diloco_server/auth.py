"""Who may call what: bearer tokens with roles, checked before a call's body is read."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import grpc

from diloco_proto.errors import ERROR_KEY, ConfigError, DilocoError, PermissionDenied, Unauthenticated
from diloco_proto.health import UNAUTHENTICATED_METHODS

from .private import private_folder, signature, warn_if_open, write_private

log = logging.getLogger("diloco.server")


class Role(StrEnum):
    """What the holder of a token may do. Each role has a file of tokens."""

    WORKER = "worker"
    """Trains: pushes contributions, pulls updates."""
    OBSERVER = "observer"
    """Looks: status, settings, an export of the parameters."""
    ADMIN = "admin"
    """Looks, and changes how the server runs; does not train."""


_ANYBODY = frozenset(Role)

ALLOWED: Mapping[str, frozenset[Role]] = {
    "/diloco.v1.Outer/Session": frozenset({Role.WORKER}),
    "/diloco.v1.Outer/Push": frozenset({Role.WORKER}),
    "/diloco.v1.Outer/Pull": _ANYBODY,
    "/diloco.v1.Outer/Describe": _ANYBODY,
    "/diloco.v1.Outer/Status": _ANYBODY,
}
"""Method -> roles. A method that is not here is for admins: whoever adds one has to think of who may call it."""

ADMIN_ONLY = frozenset({Role.ADMIN})

TOKEN_BYTES = 32
"""Random bytes of a token that we make."""

_GOOD_TOKEN = re.compile(r"[A-Za-z0-9_.~-]{16,512}")
"""What may stand in a URL and in a header as it is; shorter ones could be guessed."""


def allowed(method: str) -> frozenset[Role]:
    """The roles that may call a method (`/package.Service/Method`)."""
    return ALLOWED.get(method, ADMIN_ONLY)


class Tokens:
    """The valid tokens of each role: of `folder`/ROLE, one a line, so that two are valid while they are exchanged.

    Missing files are made, with one random token each. Files that change are read again at the next call or
    `refresh`; an empty or removed one leaves its role without a token. Without a folder the tokens end with this
    process.
    Raises ConfigError for files that cannot be used.
    """

    def __init__(self, folder: Path | None) -> None:
        self.on_change: Callable[[], None] | None = None
        self._files: dict[Role, Path] = {}
        self._known: list[tuple[bytes, Role]] = []
        self._newest: dict[Role, str] = {}
        if folder is None:
            self._take({role: [secrets.token_urlsafe(TOKEN_BYTES)] for role in Role})
            return
        private_folder(folder)
        self._files = {role: folder / role.value for role in Role}
        for role, path in self._files.items():
            if not path.exists():
                write_private(path, secrets.token_urlsafe(TOKEN_BYTES).encode("ascii") + b"\n")
                log.info("made a token for role %s: %s", role.value, path)
        self._seen = self._signatures()
        self._take({role: _read_tokens(path) for role, path in self._files.items()})

    def newest(self, role: Role) -> str:
        """The last one in its file: the one to hand out. Empty if there is none."""
        return self._newest.get(role, "")

    def roles(self, presented: str) -> frozenset[Role]:
        """What the token allows; nothing if it is not known. Its time does not depend on where two tokens differ."""
        self.refresh()
        digest = _digest(presented)
        return frozenset([role for known, role in self._known if hmac.compare_digest(known, digest)])

    def _take(self, tokens: Mapping[Role, list[str]]) -> None:
        self._newest = {role: lines[-1] for role, lines in tokens.items() if lines}
        self._known = [(_digest(line), role) for role, lines in tokens.items() for line in lines]

    def refresh(self) -> None:
        """Take up files that have changed."""
        if not self._files:
            return
        seen = self._signatures()
        if seen == self._seen:
            return
        self._seen = seen
        tokens = {}
        for role, path in self._files.items():
            try:
                tokens[role] = _read_tokens(path)
            except ConfigError as error:
                log.error("nobody has the role %s any more: %s", role.value, error)
                tokens[role] = []
        self._take(tokens)
        log.info("tokens were read again: %s", ", ".join(f"{len(lines)} {r.value}" for r, lines in tokens.items()))
        if self.on_change is not None:
            self.on_change()

    def _signatures(self) -> tuple[object, ...]:
        return tuple(signature(path) for path in self._files.values())


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call through whose token allows it; refuses any other without reading its body."""

    def __init__(self, tokens: Tokens, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens = tokens
        self._notices = Notices(clock)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = str(handler_call_details.method)
        if method in UNAUTHENTICATED_METHODS:
            return await continuation(handler_call_details)
        error = self._judge(method, handler_call_details.invocation_metadata)
        return await continuation(handler_call_details) if error is None else self._refusal(method, error)

    def _judge(self, method: str, metadata: Any) -> DilocoError | None:
        presented = [value for key, value in metadata or () if key == "authorization"]
        scheme, _, token = str(presented[0]).partition(" ") if len(presented) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not token:
            return Unauthenticated(
                "this server asks for a token and the call had none: use the join URL that the server wrote "
                "(diloco://TOKEN@…, `join-url` in its state directory), as an argument or as DILOCO_URL"
            )
        roles = self._tokens.roles(token)
        if not roles:
            return Unauthenticated(
                "the server does not know this token: it was changed or never was one of this server's. Take the "
                "join URL from `join-url` in the server's state directory"
            )
        wanted = allowed(method)
        if roles & wanted:
            return None
        name = method.rpartition("/")[2]
        return PermissionDenied(
            f"{name} is for {_listed(wanted)}, and this token is for {_listed(roles)}: use a token from "
            f"{' or '.join(f'tokens/{role.value}' for role in sorted(wanted))} in the server's state directory"
        )

    def _refusal(self, method: str, error: DilocoError) -> Any:
        """A handler that ends the call. A streaming one whatever the method: it is called before any message is read,
        and reads none."""

        async def refuse(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._notices.refused(context.peer(), method, error)
            await context.abort(error.status, str(error), ((ERROR_KEY, type(error).__name__),))

        return grpc.stream_stream_rpc_method_handler(refuse)


class Notices:
    """Logs refused calls: so many an interval, so that a flood does not fill the disk."""

    PER_INTERVAL = 20
    INTERVAL = 60.0

    def __init__(
        self, clock: Callable[[], float], per_interval: int = PER_INTERVAL, level: int = logging.WARNING
    ) -> None:
        self._clock = clock
        self._per_interval = per_interval
        self._level = level
        self._began = clock()
        self._logged = 0
        self._left_out = 0

    def refused(self, peer: str, method: str, error: DilocoError, text: str = "") -> None:
        """Log it, unless there were too many. Neither message has anything of the token. `text`: the error's, if that
        is not to be logged as it is."""
        now = self._clock()
        if now - self._began >= self.INTERVAL:
            if self._left_out:
                log.log(self._level, "and %d more calls were refused, of any peer", self._left_out)
            self._began, self._logged, self._left_out = now, 0, 0
        if self._logged >= self._per_interval:
            self._left_out += 1
            return
        self._logged += 1
        name = type(error).__name__
        extra = {"peer": peer, "error": name}
        log.log(self._level, "refused %s from %s: %s: %s", method, peer, name, text or error, extra=extra)


def _read_tokens(path: Path) -> list[str]:
    """Raises ConfigError, without the token in it."""
    try:
        lines = path.read_text("utf-8").splitlines()
        warn_if_open(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the tokens in {path}: {error}") from error
    tokens = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if not _GOOD_TOKEN.fullmatch(line):
            raise ConfigError(
                f"line {number} of {path} is no token: 16 to 512 letters, digits, and - _ . ~. A good one: "
                'python3 -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
        tokens.append(line)
    return tokens


def _digest(token: str) -> bytes:
    """Of one length, whatever the token's: so that comparing takes equally long."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _listed(roles: frozenset[Role]) -> str:
    return " and ".join(f"{role.value}s" for role in sorted(roles))
