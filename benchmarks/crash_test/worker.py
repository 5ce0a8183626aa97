"""One training process of the crash test: `python -m crash_test.worker '{"name": "worker-0", …}'`.

It trains until the file `finish` is there, with a checkpoint now and then, ends together with the others and records
what it holds then. It may be killed at any moment, and started again from its last checkpoint or without.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import diloco_client

from . import training
from .record import Lives, Record, watch

CHECKPOINT_EVERY = 7
"""Inner steps; in step with nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What one process has to do."""

    name: str
    index: int
    workers: int
    seed: int
    life: int
    """How many processes this worker had before."""
    resume: bool
    """From its last checkpoint, if there is one."""
    folder: str
    """For its checkpoint and its record."""
    url_file: str
    finish: str

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


def main(task: Task) -> None:
    torch.set_num_threads(1)
    folder, life = Path(task.folder), f"{task.name}.{task.life}"
    record = Record(folder / "record.jsonl", life)
    model, optimizer = training.build(task.seed)
    data = training.batches(task.index, task.workers, seed=(task.seed * 64 + task.index) * 1024 + task.life)
    state, lives, done = None, Lives(), 0
    checkpoint = folder / "checkpoint"
    if task.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state, lives, done = saved["outer"], [tuple(entry) for entry in saved["lives"]], saved["steps"]
    lives.append((life, done + 1))
    watch(record, lives)
    outer = diloco_client.join(f"file:{task.url_file}", model, optimizer, worker_id=task.name, state=state)
    assert outer.stats.steps == done
    record.write("joined", resumed=done)
    while not Path(task.finish).exists():
        training.train_step(model, optimizer, next(data))
        if outer.stats.steps % CHECKPOINT_EVERY == 0:
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "outer": outer.state_dict(),
                "lives": lives,
                "steps": outer.stats.steps,
            }
            torch.save(saved, folder / "checkpoint.tmp")
            (folder / "checkpoint.tmp").replace(checkpoint)
    record.write("flushing")
    outer.flush(together=True)
    theta = outer.global_state_dict()
    holds = all(torch.equal(value, theta[name]) for name, value in model.state_dict().items() if name in theta)
    record.write("finished", digests=[f"{d:016x}" for _, d in sorted(outer.base_digests().items())], holds_theta=holds)
    outer.close()


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
