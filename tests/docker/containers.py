"""Images and compose services as processes of this machine: their very commands, environments and volumes.

An engine would also give each a file system, a network and a user of its own. Here the paths of an image and of volumes
are replaced by those of this machine, and so are the server's name and port.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from dockerfile_parse import DockerfileParser

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
PORT = 50051
OURS = ("PATH", "NUMBA_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")
"""Variables of the images that are not taken: programs, compiled kernels and bytecode are those of this machine."""


@dataclass(frozen=True)
class Image:
    """What a Dockerfile says of the containers made of it, and how it is built."""

    base: str
    user: str
    env: Mapping[str, str]
    entrypoint: list[str]
    command: list[str]
    health: list[str]
    """Empty: it has none."""
    volumes: list[str]
    copies: list[str]
    """What is taken from the repository, in all stages."""
    runs: list[str]
    """Shell commands, in all stages."""

    @classmethod
    def of(cls, name: str) -> Image:
        content = (DOCKER / f"{name}.Dockerfile").read_bytes()
        parser = DockerfileParser(fileobj=io.BytesIO(content))
        steps = [(step["instruction"], step["value"]) for step in parser.structure]
        last = dict(steps)
        health = last["HEALTHCHECK"].partition("CMD")[2].strip()
        copied = [value.split() for instruction, value in steps if instruction == "COPY" and "--from" not in value]
        return cls(
            base=parser.baseimage,
            user=last["USER"],
            env=dict(parser.envs),
            entrypoint=json.loads(last.get("ENTRYPOINT", "[]")),
            command=json.loads(last.get("CMD", "[]")),
            health=json.loads(health) if health else [],
            volumes=json.loads(last.get("VOLUME", "[]")),
            copies=[source for words in copied for source in words[:-1]],
            runs=[value for instruction, value in steps if instruction == "RUN"],
        )


def compose(**chosen: str) -> dict[str, Any]:
    """docker-compose.yml, for these variables of the user."""
    services: dict[str, Any] = _interpolated(yaml.safe_load((DOCKER / "docker-compose.yml").read_text()), chosen)
    return services


def kubernetes() -> dict[str, Any]:
    """Kind -> object of kubernetes.yaml."""
    return {found["kind"]: found for found in yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())}


def seconds(duration: str) -> float:
    """Of compose's `45s`."""
    assert duration.endswith("s")
    return float(duration[:-1])


def mounts(service: Mapping[str, Any]) -> dict[str, str]:
    """Path in the container -> volume, of a compose service."""
    found = {}
    for volume in service["volumes"]:
        source, target = (volume["source"], volume["target"]) if isinstance(volume, dict) else volume.split(":")
        found[target] = source
    return found


class Machine:
    """Where containers run. `folder` holds the volumes."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self._port = port

    def volume(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(exist_ok=True, mode=0o700)
        return path

    def start(
        self, image: Image, command: list[str], env: Mapping[str, str], volumes: Mapping[str, str], log: Path
    ) -> subprocess.Popen[str]:
        """A container; what it says goes to `log`. `command` as in compose: empty is the image's."""
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as out:
            return subprocess.Popen(
                self._words([*image.entrypoint, *(command or image.command)], volumes),
                env=self._environment(image, env, volumes),
                cwd=log.parent,
                stdout=out,
                stderr=out,
                text=True,
            )

    def run(
        self, image: Image, command: list[str], env: Mapping[str, str], volumes: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """A command within a container, as by `docker exec`: a health check."""
        environment = self._environment(image, env, volumes)
        return subprocess.run(
            self._words(command, volumes), env=environment, capture_output=True, text=True, timeout=60
        )

    def _environment(self, image: Image, env: Mapping[str, str], volumes: Mapping[str, str]) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("DILOCO_")}
        theirs = {name: self._here(value, volumes) for name, value in {**image.env, **env}.items() if name not in OURS}
        # A container has all ports to itself.
        return {**ours, **theirs, "DILOCO_PORT": str(self._port)}

    def _words(self, command: list[str], volumes: Mapping[str, str]) -> list[str]:
        program, *arguments = command
        found = Path(sys.executable).with_name(program)
        assert found.exists(), f"{program} is no program of the image"
        return [str(found), *(self._here(word, volumes) for word in arguments)]

    def _here(self, text: str, volumes: Mapping[str, str]) -> str:
        for target, name in volumes.items():
            text = text.replace(target, str(self.volume(name)))
        text = text.replace("/opt/diloco/examples", str(REPOSITORY / "examples"))
        return re.sub(rf"\b(server|diloco|127\.0\.0\.1):{PORT}\b", f"127.0.0.1:{self._port}", text)


def shell(command: str, *, env: Mapping[str, str], cwd: Path, **paths: Path) -> None:
    """Run a RUN step; `paths` are those that stand in the place of /opt/NAME."""
    for name, path in paths.items():
        command = command.replace(f"/opt/{name}", shlex.quote(str(path)))
    done = subprocess.run(["sh", "-ec", command], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _interpolated(value: Any, chosen: Mapping[str, str]) -> Any:
    """With ${NAME:-default} replaced, as compose does: an empty variable counts as none."""
    if isinstance(value, dict):
        return {key: _interpolated(item, chosen) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolated(item, chosen) for item in value]
    if not isinstance(value, str):
        return value
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: chosen.get(found[1]) or found[2], value)
    assert "$" not in text, f"a form of interpolation that is not known here: {value}"
    return text
