"""What one can choose about a demo. Imports nothing heavy, so that `--help` stays quick."""

import dataclasses
from pathlib import Path

from diloco_proto.codec.formats import Format
from diloco_proto.errors import ConfigError, DilocoError
from diloco_proto.options import option
from diloco_proto.schedule import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """Settings of one demo; the defaults were tuned for two cores."""

    workers: int = option(4, "Workers that train together; one more trains alone for comparison.")
    steps: int = option(400, "Inner steps of every worker.")
    sync_every: int = option(25, "H: inner steps between two rounds of a fragment.")
    num_fragments: int = option(4, "P: fragments the model is cut into.")
    overlap_steps: int = option(2, "τ: inner steps from pushing a fragment to merging it.")
    mixing_alpha: float = option(0.5, "α: share of the local parameters kept at a merge.")
    codec: str = option("int4", "Block format of both directions.", choices=tuple(f.label for f in Format))
    outer_lr: float = option(0.7, "η of the outer optimizer.")
    outer_momentum: float = option(0.9, "μ of the outer optimizer (Nesterov).")
    seed: int = option(0, "Chooses the initial weights and the order of the data.")
    out: Path = option(Path("demo-out"), "Where report.json, loss.png and the logs of all processes go.")
    json: bool = option(False, "Print the report as one line of JSON, last; the display goes to stderr.")

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")
        if self.steps < self.sync_every:
            raise ConfigError(
                f"steps ({self.steps}) must be at least sync_every ({self.sync_every}), or no round takes place"
            )
        Schedule(self.sync_every, self.num_fragments, self.overlap_steps)  # refuses what cannot work


class DemoError(DilocoError):
    """A process of the demo ended before its work was done; the message has the last lines of its log."""
