"""What the Dockerfiles, docker-compose.yml and kubernetes.yaml promise, read from them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from containers import DOCKER, REPOSITORY, Image, compose, kubernetes, mounts, seconds

from diloco_client.network import Network
from diloco_server import ServerConfig

IMAGES = ("server", "worker")
STATE = "/var/lib/diloco"


@pytest.mark.parametrize("name", IMAGES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    command = [str(Path(sys.executable).with_name("hadolint")), str(DOCKER / f"{name}.Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_nobody_in_particular_from_a_base_with_a_version(name: str) -> None:
    image = Image.of(name)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", image.user), "a number: Kubernetes cannot judge a name"
    assert image.user == Image.of("server").user, "or workers could not read the join URL"
    assert any(f"--uid {image.user.partition(':')[0]} " in step for step in image.runs)
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", image.base)


def test_the_server_has_no_torch_and_the_worker_has() -> None:
    assert not any("torch" in step for step in Image.of("server").runs)
    assert any("'.[torch]'" in step for step in Image.of("worker").runs)


def test_the_server_keeps_its_state_in_a_volume_and_can_write_its_kernels() -> None:
    image = Image.of("server")
    assert image.volumes == [STATE] == [image.env["DILOCO_STATE_DIR"]]
    made = next(step for step in image.runs if "install -d" in step)
    assert f"-o diloco -g diloco {STATE} {image.env['NUMBA_CACHE_DIR']} /run/diloco" in made
    assert image.entrypoint == ["diloco-server"]
    assert image.health[:2] == ["diloco-client", "health"]


@pytest.mark.parametrize("name", IMAGES)
def test_what_an_image_copies_is_there_and_not_ignored(name: str) -> None:
    rules = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in rules
    for source in Image.of(name).copies:
        assert (REPOSITORY / source).exists()
        assert f"!{source.partition('/')[0]}" in rules


# -- compose --


def test_a_server_with_tls_and_token_whose_secrets_the_workers_do_not_see() -> None:
    services = compose()["services"]
    server, worker = services["server"], services["worker"]
    env = {**Image.of("server").env, **server["environment"]}
    assert ServerConfig(host=env["DILOCO_HOST"]).guarded
    assert "DILOCO_INSECURE" not in env
    (shared,) = set(mounts(server).values()) & set(mounts(worker).values())
    assert mounts(server)[STATE] != shared
    assert env["DILOCO_JOIN_URL_FILE"] == worker["environment"]["DILOCO_URL_FILE"]
    (join,) = (v for v in worker["volumes"] if isinstance(v, dict))
    assert join["source"] == shared
    assert join["read_only"] is True
    assert set(compose()["volumes"]) == {*mounts(server).values(), *mounts(worker).values()}


def test_four_workers_of_any_number() -> None:
    worker = compose()["services"]["worker"]
    assert worker["scale"] == 4
    assert "container_name" not in worker
    assert "ports" not in worker
    assert "--name" not in worker["command"]
    assert worker["depends_on"] == {"server": {"condition": "service_healthy"}}


def test_nothing_is_killed_while_it_drains() -> None:
    services = compose()["services"]
    server, worker = services["server"], services["worker"]
    assert seconds(server["stop_grace_period"]) > float(server["environment"]["DILOCO_DRAIN_SECONDS"])
    assert seconds(worker["stop_grace_period"]) > notice_of_the_example()


@pytest.mark.parametrize(("chosen", "limit"), [("", 0.0), ("250000", 250_000.0)])
def test_links_are_limited_on_request(chosen: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = compose(DILOCO_UPLOAD_LIMIT=chosen, DILOCO_DOWNLOAD_LIMIT=chosen)["services"]["worker"]
    for name, value in worker["environment"].items():
        monkeypatch.setenv(name, value)
    network = Network.chosen()
    assert (network.upload_limit, network.download_limit) == (limit, limit)


@pytest.mark.parametrize("name", IMAGES)
def test_a_service_has_no_rights_that_it_does_not_need(name: str) -> None:
    service = compose()["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True


# -- Kubernetes --


@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_a_pod_runs_as_the_user_of_its_image(kind: str) -> None:
    pod, container = pod_of(kind)
    assert pod["securityContext"]["runAsNonRoot"] is True
    uid, gid = map(int, Image.of("server").user.split(":"))
    context = pod["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (uid, gid, gid)
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_a_pod_of_the_server() -> None:
    pod, container = pod_of("StatefulSet")
    found = kubernetes()["StatefulSet"]["spec"]
    env = {each["name"]: each["value"] for each in container["env"]}
    assert found["replicas"] == 1
    assert pod["terminationGracePeriodSeconds"] > float(env["DILOCO_DRAIN_SECONDS"])
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["exec"]["command"] == Image.of("server").health
        assert container[probe]["timeoutSeconds"] > 5, "the time that the command takes to say no"
    assert "livenessProbe" not in container
    written = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert written == {STATE, Image.of("server").env["NUMBA_CACHE_DIR"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    (claim,) = found["volumeClaimTemplates"]
    assert {"name": claim["metadata"]["name"], "mountPath": STATE} in container["volumeMounts"]
    service = kubernetes()["Service"]
    assert env["DILOCO_ADVERTISE"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["selector"].items() <= found["template"]["metadata"]["labels"].items()


def test_pods_of_the_workers() -> None:
    pod, container = pod_of("Job")
    job = kubernetes()["Job"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == 4
    assert pod["terminationGracePeriodSeconds"] > notice_of_the_example()
    assert pod["shareProcessNamespace"] is True
    (url_file,) = (Path(each["value"]) for each in container["env"] if each["name"] == "DILOCO_URL_FILE")
    (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == str(url_file.parent))
    (volume,) = (v for v in pod["volumes"] if v["name"] == mount["name"])
    assert mount["readOnly"] is True
    text = (DOCKER / "kubernetes.yaml").read_text()
    assert f"create secret generic {volume['secret']['secretName']} --from-file={url_file.name}=" in text
    assert f"cat {STATE}/join-url" in text


def pod_of(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's spec and its only container."""
    pod = kubernetes()[kind]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def notice_of_the_example() -> float:
    """Seconds that the worker's program takes at most after SIGTERM."""
    found = re.search(r"sigterm_seconds=(\d+)", (REPOSITORY / "examples" / "plain.py").read_text())
    assert found is not None
    return float(found[1])
