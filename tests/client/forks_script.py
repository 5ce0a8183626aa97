"""A trainer with DataLoader workers of every kind, in a real run: `forks_script.py ADDRESS` prints what it found."""

import json
import multiprocessing
import pickle
import signal
import sys
import threading
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import diloco_client

BATCHES, EPOCHS = 3, 2


class Data(Dataset[torch.Tensor]):
    """Holds what people give their data sets: the model, and the optimizer that is hooked."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, shard: tuple[int, int]) -> None:
        self.model, self.optimizer, self.shard = model, optimizer, shard

    def __len__(self) -> int:
        return 8 * BATCHES

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            assert self.model(torch.ones(4)).shape == (1,)
        return torch.full((4,), float(index * self.shard[1] + self.shard[0]))


def train(
    loader: DataLoader[torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer, epochs: int
) -> None:
    for _ in range(epochs):
        for x in loader:
            optimizer.zero_grad()
            model(x / 10).square().mean().backward()
            optimizer.step()


def in_a_fork(outer: Any, optimizer: torch.optim.Optimizer, answers: Any) -> None:
    """What a forked child may do, and what it is told that it may not."""
    found = {"shard": outer.shard.count, "id": outer.worker_id, "steps": outer.stats.steps, "stop": outer.should_stop}
    optimizer.zero_grad()  # the parameters are in shared memory by now, since a worker was spawned with them
    optimizer.step()
    for name in ("flush", "state_dict", "base_digests", "global_state_dict"):
        try:
            getattr(outer, name)()
        except RuntimeError as error:
            found[name] = "was forked from that of worker 'w'" in str(error)
    with outer:
        pass  # leaves nothing, since it is not here that it joined
    answers.put(found | {"steps after": outer.stats.steps})
    answers.close()


def fork_while_locked(outer: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fork while a thread of the worker is within its lock, which nobody opens in the child."""
    context = multiprocessing.get_context("fork")
    answers, locked, done = context.Queue(), threading.Event(), threading.Event()

    def hold() -> None:
        with outer._courier._changed, outer._link._changed, outer._transport.counters._lock:
            locked.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait()
    child = context.Process(target=in_a_fork, args=(outer, optimizer, answers), daemon=True)
    child.start()
    done.set()
    holder.join()
    found: dict[str, Any] = answers.get(timeout=60)
    child.join(60)
    return found | {"exit": child.exitcode}


def end_a_fork() -> int | None:
    """Children take SIGTERM as ever: DataLoader ends its workers with it."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    child = context.Process(target=wait_for_ever, args=(started,), daemon=True)
    child.start()
    started.wait()
    child.terminate()
    child.join(60)
    return child.exitcode


def wait_for_ever(started: Any) -> None:
    started.set()
    while True:
        signal.pause()


def main(address: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with diloco_client.join(address, model, optimizer, worker_id="w", sigterm_seconds=30) as outer:
        data = Data(model, optimizer, (outer.shard.index, outer.shard.count))
        for kind, number, persistent in (("fork", 2, False), ("fork", 2, True), ("spawn", 1, True)):
            loader = DataLoader(
                data, batch_size=8, num_workers=number, multiprocessing_context=kind, persistent_workers=persistent
            )
            train(loader, model, optimizer, EPOCHS)
        report: dict[str, Any] = {"steps": outer.stats.steps, "fork": fork_while_locked(outer, optimizer)}
        report["terminated"] = end_a_fork()
        try:
            pickle.dumps(outer)
        except TypeError as error:
            report["pickle"] = str(error)
        report["copied"] = pickle.loads(pickle.dumps(optimizer)).state_dict()["param_groups"][0]["lr"]
        train(DataLoader(data, batch_size=8), model, optimizer, 1)
        outer.flush()
        report["digests"], report["counted"] = outer.base_digests(), outer.stats.counted
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
