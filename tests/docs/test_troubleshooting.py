"""docs/troubleshooting.md against the code: every class of error has a heading, and every message is somebody's."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from documents import ROOT

from diloco_proto import errors

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()
GAP = "\0"
"""What a message fills in."""


def classes() -> dict[str, type[errors.DilocoError]]:
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.DilocoError)]
    return {c.__name__: c for c in found}


def sections() -> dict[str, str]:
    """Title -> text."""
    parts = re.split(r"^## (.*)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def messages(section: str) -> list[str]:
    """Those in the first column of its tables."""
    rows = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    return [m for row in rows for m in re.findall(r"`([^`]+)`", row)]


@cache
def texts_of_the_code() -> tuple[str, ...]:
    """All strings in it, with a GAP where something is filled in, whether by an f-string or by logging."""
    found = []
    for folder in ("proto", "server", "client", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else GAP for v in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[.\d]*[a-z]", GAP, node.value))
    return tuple(found)


def is_in_the_code(message: str) -> bool:
    """A message whose … stand for what is filled in, or left out at its end."""
    parts = [re.escape(part) for part in message.split("…")]
    pattern = re.compile(".*?".join(parts), re.DOTALL)
    return any(pattern.match(text.lstrip(GAP)) or pattern.match(text) for text in texts_of_the_code())


def test_every_class_has_a_heading() -> None:
    assert classes().keys() <= sections().keys()


@pytest.mark.parametrize("title", [t for t in sections() if t != "No error, but"])
def test_its_messages_are_those_of_the_code(title: str) -> None:
    listed = messages(sections()[title])
    assert listed, "a heading without a message"
    assert [m for m in listed if not is_in_the_code(m)] == []


def test_what_is_logged_is_logged_by_the_code() -> None:
    listed = [m for m in messages(sections()["No error, but"]) if "…" in m]
    assert len(listed) > 6
    assert [m for m in listed if not is_in_the_code(m)] == []


def test_the_check_bites() -> None:
    assert is_in_the_code("sync_every (…) must be at least num_fragments (…), …")
    assert not is_in_the_code("sync_every (…) must be at most num_fragments (…), …")
    assert not is_in_the_code("sync_every must be")
    assert messages("| `one`, `two` | `three` |\n") == ["one", "two"]
