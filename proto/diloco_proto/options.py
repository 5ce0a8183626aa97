"""Settings as dataclasses: one field makes a flag, an environment variable, a file key and its help."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help_text: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a command-line option."""
    return field(default=default, metadata={"help": help_text, "choices": choices})
