"""Files that only their owner may read: keys, tokens, join URLs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from diloco_proto.errors import ConfigError

log = logging.getLogger("diloco.server")


def private_folder(path: Path) -> Path:
    """Make a folder with mode 0700 unless it is there. Raises ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {path}: {error.strerror}") from error
    warn_if_open(path)
    return path


def write_private(path: Path, data: bytes) -> None:
    """Put a file with mode 0600 in the place of what is there, whole or not at all. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def warn_if_open(path: Path) -> None:
    """Say so when others than the owner may read a secret. Not refused: in containers the mode is not always ours."""
    mode = path.stat().st_mode
    if mode & 0o077:
        log.warning("%s can be read by others (mode %o): chmod go= %s", path, mode & 0o777, path)


Signature = tuple[int, int, int] | None


def signature(path: Path) -> Signature:
    """Changes when the file is written or replaced; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
