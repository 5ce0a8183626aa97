"""The documents as a reader sees them: code blocks, commands, inline code, links and headings."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")])
SHELL = ("", "sh", "bash", "console", "shell")
"""Languages of blocks that may hold commands."""

OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>&1"}


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of code."""

    document: Path
    line: int
    """Of its first line, from 1."""
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One simple command, without what is before and after an operator."""

    where: str
    words: tuple[str, ...]
    environment: tuple[str, ...] = ()
    """NAME=VALUE before it."""

    @property
    def program(self) -> str:
        """Without the folder of a virtual environment."""
        return re.sub(r"^(\.venv|/opt/diloco)/bin/", "", self.words[0])

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def blocks(document: Path) -> Iterator[Block]:
    """Fenced blocks, and those indented by four spaces, as language `indented`."""
    fence: list[str] | None = None
    indented: list[str] = []
    language, start = "", 0
    for number, line in enumerate([*document.read_text().splitlines(), ""], 1):
        if fence is not None:
            if line.startswith("```"):
                yield Block(document, start, language, "\n".join(fence))
                fence = None
            else:
                fence.append(line)
            continue
        if line.startswith("    "):
            start = start if indented else number
            indented.append(line[4:])
            continue
        if indented and line.strip():
            yield Block(document, start, "indented", "\n".join(indented).rstrip())
            indented = []
        if line.startswith("```"):
            fence, language, start = [], line[3:].strip(), number + 1


def prose(document: Path) -> str:
    """Without fenced blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(document: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(document))]


def commands_of(text: str, where: str) -> list[Command]:
    """Those of a piece of shell, line by line, and those that stand in quotes for a terminal multiplexer."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        simple: list[str] = []
        to_file = False
        for word in [*lexer, ";"]:
            if word in (">", ">>", "<"):
                to_file = True
                continue
            if to_file:
                to_file = False
                continue
            if word not in OPERATORS:
                simple.append(word)
                continue
            if simple:
                found += _command(simple, where)
            simple = []
    return found


def _command(words: list[str], where: str) -> list[Command]:
    while words and words[0] in ("do", "until", "while", "done", "sudo"):
        words = words[1:]
    if words[:1] == ["-u"]:  # sudo's
        words = words[2:]
    environment = []
    while words and re.match(r"[A-Z_]+=", words[0]):
        environment.append(words[0])
        words = words[1:]
    if not words:
        return []
    quoted = [c for w in words[1:] if " " in w and words[0] == "tmux" for c in commands_of(w, where)]
    return [Command(where, tuple(words), tuple(environment)), *quoted]


def headings(document: Path) -> set[str]:
    """Anchors, as GitHub makes them."""
    seen: Counter[str] = Counter()
    anchors = set()
    for title in re.findall(r"^#+ (.*)$", prose(document), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


def links(document: Path) -> list[str]:
    """Targets within the repository, as they are written."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    return [target for target in found if not re.match(r"[a-z]+:", target)]
