"""Shared fixtures: real workers as threads against a real server on loopback."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """A command that runs within a test sends the log to a stream that ends with it."""
    root, ours = logging.getLogger(), logging.getLogger("diloco")
    handlers, level, our_level = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(our_level)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Workers run side by side on few cores; intra-op threads would only fight."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that are started without --state-dir keep their run apart from those of other tests."""
    monkeypatch.setenv("DILOCO_STATE_DIR", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def together() -> Callable[..., list[Any]]:
    """Run functions of one argument, each on a thread with its index; results in order, first error raised."""

    def run(count: int, target: Callable[[int], Any], timeout: float = 60.0) -> list[Any]:
        results: list[Any] = [None] * count
        errors: list[BaseException] = []

        def body(index: int) -> None:
            try:
                results[index] = target(index)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        if errors:
            raise errors[0]
        assert not any(t.is_alive() for t in threads), "a worker did not finish in time"
        return results

    return run
