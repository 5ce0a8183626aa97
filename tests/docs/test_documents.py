"""README and docs/ against the code: commands, settings, variables, files, links, and Python that compiles."""

from __future__ import annotations

import ast
import configparser
import re
import textwrap
import tomllib
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, SHELL, Block, Command, blocks, commands_of, headings, inline_code, links, prose
from programs import NotUnderstood, all_options, all_variables, check, parse_server

import diloco_client

OUR_PROGRAM = re.compile(
    r"(\.venv/bin/)?(diloco-(server|client)\b|python3? (-m diloco_cli|examples/|benchmarks/)|make \w)"
)
"""How a command of ours begins."""

EVERY = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

OTHERS_OPTIONS = {
    *("--build", "--build-arg", "--dry-run", "--health-cmd", "--max-restarts", "--nproc-per-node", "--pull", "--scale"),
    *("--stop-timeout", "--system-site-packages", "--user", "--volumes"),
}
"""Of docker, kubectl, torchrun and venv."""


def is_shell(block: Block) -> bool:
    """Whether these are commands: drawings, messages and pseudo-code have no language either."""
    if block.language == "indented":
        return bool(OUR_PROGRAM.match(block.text))
    if block.language not in SHELL:
        return False
    try:
        first = commands_of(block.text, block.where)[:1]
    except ValueError:
        return False
    return bool(first) and (first[0].words[0].isascii() and re.fullmatch(r"[\w./-]+", first[0].words[0]) is not None)


def all_commands(document: Path) -> list[Command]:
    """Those in blocks, and those of ours in the running text."""
    found = [c for block in blocks(document) if is_shell(block) for c in commands_of(block.text, block.where)]
    where = str(document.relative_to(ROOT))
    for code in inline_code(document):
        if OUR_PROGRAM.match(code):
            found += commands_of(code, where)
    return found


@EVERY
def test_commands_are_understood(document: Path) -> None:
    wrong = []
    for command in all_commands(document):
        try:
            check(command)
        except NotUnderstood as error:
            wrong.append(f"{command}\n    {error}")
    assert not wrong, "\n".join(wrong)


@EVERY
def test_python_compiles(document: Path) -> None:
    for block in blocks(document):
        if block.language == "python":
            try:
                ast.parse(textwrap.dedent(block.text))
            except SyntaxError as error:
                pytest.fail(f"{block.where}: {error}")


@EVERY
def test_what_python_blocks_take_from_the_package_is_there(document: Path) -> None:
    """Names of the modules, and arguments of `join`."""
    known = {"diloco_client": diloco_client, "outer": diloco_client.Outer}
    for block in blocks(document):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(block.text))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in known:
                assert hasattr(known[ast.unparse(node.value)], node.attr), f"{block.where}: {ast.unparse(node)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "diloco_client.join":
                arguments = diloco_client.join.__kwdefaults__
                assert {k.arg for k in node.keywords} <= arguments.keys(), f"{block.where}: {ast.unparse(node)}"


@EVERY
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for target in links(document):
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        if not there.exists() or (anchor and anchor not in headings(there)):
            broken.append(target)
    assert not broken


@EVERY
def test_files_in_the_running_text_are_there(document: Path) -> None:
    named = [c for c in inline_code(document) if re.fullmatch(r"(docs|examples|benchmarks|tests)/[\w./-]+", c)]
    assert [name for name in named if not (ROOT / name).exists()] == []


@EVERY
def test_options_in_the_running_text_exist(document: Path) -> None:
    known = all_options() | OTHERS_OPTIONS
    named = {
        flag for code in inline_code(document) for flag in re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*(?![\w-])", code)
    }
    assert named - known == set()


@EVERY
def test_variables_exist(document: Path) -> None:
    named = set(re.findall(r"DILOCO_[A-Z][A-Z_]*[A-Z]", document.read_text()))
    assert named - all_variables() == set()


@EVERY
def test_settings_files_are_taken(document: Path) -> None:
    """Keys of TOML files of the server, and the command of a systemd unit."""
    for block in blocks(document):
        if block.language == "toml":
            values = tomllib.loads(block.text)
            words = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
            assert parse_server(words).keys() == values.keys(), block.where
        if block.language == "ini":
            unit = configparser.ConfigParser(strict=False)
            unit.optionxform = str  # type: ignore[assignment,method-assign]
            unit.read_string(block.text)
            [command] = commands_of(unit["Service"]["ExecStart"], block.where)
            assert command.program == "diloco-server"
            check(command)


def test_every_document_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / target).resolve() for target in links(index)}
    assert {d for d in DOCUMENTS if d not in (index, ROOT / "README.md")} == listed


def test_every_example_is_listed_short_and_alone() -> None:
    folder = ROOT / "examples"
    found = {path for path in folder.rglob("*.py") if "__pycache__" not in path.parts}
    listed = {(folder / target).resolve() for target in links(folder / "README.md")} - {
        (ROOT / "docs" / "getting-started.md")
    }
    assert listed == found
    for path in found - {folder / "unmodified" / "train.py"}:
        assert len(path.read_text().splitlines()) < 80, path


def test_these_checks_bite() -> None:
    for wrong in (
        "diloco-server --sync-evry 5",
        "diloco-server --sync-every many",
        "diloco-server --sync-every 2 --overlap-steps 5",
        "diloco-client stats",
        "diloco-client status --round 5",
        "diloco-client run -- python examples/none.py",
        "python examples/plain.py --speed 5",
        "python -m diloco_cli.simulate --hours none",
        "torchrun --nproc-per-node 2 examples/none.py",
        "make everything",
        "pip install '.[all]'",
        "dilco-server",
    ):
        with pytest.raises(NotUnderstood):
            for command in commands_of(wrong, "here"):
                check(command)
    assert "DILOCO_SYNC_EVRY" not in all_variables()
    assert "not-there" not in headings(ROOT / "README.md")
    assert len([c for d in DOCUMENTS for c in all_commands(d)]) > 60
    assert "τ-the-overlap" in headings(ROOT / "docs" / "choosing.md")
    assert prose(ROOT / "README.md").count("```") == 0
