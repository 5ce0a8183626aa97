"""What is raised when a promise of the design does not hold."""

from __future__ import annotations

PROMISES = {
    1: "one theta",
    2: "order does not matter",
    3: "nothing counted twice, nothing acknowledged lost",
    4: "no worker can stop the others",
    5: "local work is never thrown away",
    6: "the server decides, once",
    7: "memory is O(model)",
}
"""Of the design, by number."""


class BrokenPromise(AssertionError):
    """A promise of the design does not hold. `time` and `seed` are filled in by whoever runs the simulation."""

    def __init__(self, promise: int, text: str, *, worker_id: str = "", fragment: int | None = None) -> None:
        super().__init__(promise, text)  # by which it is made again when another process found it
        self.promise = promise
        self.text = text
        self.worker_id = worker_id
        self.fragment = fragment
        self.time = 0.0
        self.seed: int | None = None

    def __str__(self) -> str:
        where = f"worker {self.worker_id!r}, " if self.worker_id else ""
        where += f"fragment {self.fragment}, " if self.fragment is not None else ""
        text = f"promise {self.promise} ({PROMISES[self.promise]}): {where}at {self.time:.3f} s: {self.text}"
        if self.seed is None:
            return text
        return f"{text}\nreplay: python -m diloco_cli.simulate --seed {self.seed} --verbose"
