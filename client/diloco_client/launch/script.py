"""A training script in a run that it knows nothing of: joins after its first inner step, counts, and ends with it."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from diloco_client.hook import Outer
from diloco_client.joining import join
from diloco_client.observe import export
from diloco_client.optimizers import check_not_captured, check_optimizers
from diloco_proto.errors import DilocoError, UnsupportedModel

from .ending import call_at_end, failure, leave
from .roots import Held, find_trained, modules_of
from .settings import MARK_VARIABLE, Launch
from .steps import PATIENCE, Clock, InnerSteps, living_optimizers, skipped, trained_by, within_its_own_step

log = logging.getLogger("diloco")

ALTERNATIVE = (
    "Join in the script instead: `with diloco_client.join(None, model, optimizer) as outer:` around its loop "
    "(docs/launcher.md)"
)


class Script:
    """Follows the optimizers of this process.

    It joins when the first inner step is over rather than before: torch.compile has compiled then, so that no other
    worker waits for it; all optimizers that train have shown themselves; and no backward pass is under way whose
    tensors a change of the parameters would spoil. That first step is kept only if this worker seeds the run.

    What goes wrong ends the script by SystemExit, which `except Exception` does not catch: it must not go on alone
    unnoticed.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._steps = InnerSteps()
        self._clock = Clock()
        self._outer: Outer | None = None
        self._held: Held | None = None
        self._strangers: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()
        """Optimizers whose steps are not the run's -> how many they took since one of the run's last stepped."""
        self._failure = ""
        self._over = False
        self._process = os.getpid()

    @classmethod
    def of_this_process(cls) -> Self:
        """As `diloco-client run` was told. From here on the log goes to stderr."""
        launch = Launch.of_environment()
        if not log.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("diloco: %(message)s"))
            log.addHandler(handler)
            log.propagate = False
            log.setLevel(launch.options.log_level.upper())
        return cls(launch)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of this process has stepped."""
        if self._failure:
            sys.exit(self._failure)
        if self._over or optimizer is self._clock or skipped(optimizer) or within_its_own_step(optimizer):
            return
        try:
            if os.getpid() != self._process:
                raise UnsupportedModel(
                    f"this process was forked from the worker {self._process} and trains too; only one of them can be "
                    f"in the run. {ALTERNATIVE}"
                )
            check_not_captured()
            if self._outer is None:
                gc.collect()  # what the script has given up is not to be found
                self._steps.watch(living_optimizers())
                if self._steps.over(optimizer):
                    self._join()
            elif not self._is_ours(optimizer):
                self._bear_with(optimizer)
            elif self._steps.over(optimizer):
                self._count(self._outer)
        except (DilocoError, ValueError) as error:
            self._fail(error)

    # -- joining --

    def _join(self) -> None:
        options = self._launch.options
        stepped = self._steps.order
        self._check(stepped)
        trained = find_trained([*stepped, *(o for o in living_optimizers() if o not in stepped)])
        for optimizer in trained.left_out:
            self._leave_out(optimizer)
        self._held = Held.of(trained)
        self._outer = join(
            self._launch.address,
            trained.module,
            [*trained.optimizers, self._clock],
            worker_id=self._worker_id(),
            connect_timeout=options.connect_timeout,
            token=options.token,
            ca_cert=self._launch.ca_cert,
            client_cert=self._launch.client_cert,
            client_key=self._launch.client_key,
            data_connections=options.data_connections,
            upload_limit=options.upload_limit,
            download_limit=options.download_limit,
            sigterm_seconds=options.sigterm_seconds,
            island=self._island(),
        )
        call_at_end(self._end)
        _take_mark()

    def _worker_id(self) -> str | None:
        options = self._launch.options
        if options.worker_id and options.island == "none" and _distributed():
            return f"{options.worker_id}-{dist.get_rank()}"
        return options.worker_id

    def _island(self) -> dist.ProcessGroup | bool | None:
        """What `join` is told of it. The other ranks of a process group do the same."""
        if self._launch.options.island == "auto" or not _distributed():
            return None
        return dist.group.WORLD if self._launch.options.island == "world" else False

    def _check(self, stepped: list[torch.optim.Optimizer]) -> None:
        """Raises UnsupportedModel where a script cannot be followed."""
        if torch._C._current_graph_task_id() != -1:
            raise UnsupportedModel(
                "the script steps its optimizers within the backward pass, in which parameters cannot be merged. Let "
                "it step them afterwards"
            )
        if threading.current_thread() is not threading.main_thread():
            raise UnsupportedModel(f"the script trains in a thread, whose end cannot be seen. {ALTERNATIVE}")
        hooks = [hook for o in stepped for hook in o._optimizer_step_post_hooks.values()]
        if any(isinstance(getattr(hook, "__self__", None), Outer) for hook in hooks):
            raise UnsupportedModel("the script joins a run by itself: start it without `diloco-client run`")

    def _is_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of this optimizer counts. One that is made later does if it trains what the run does, and
        takes the place of those that trained the same. Raises UnsupportedModel if it trains other tensors of the module
        too, MasterWeights if it is of that kind."""
        assert self._held is not None
        if optimizer in self._strangers:
            return False
        if self._steps.knows(optimizer):
            return True
        steps = {id(t) for t in trained_by(optimizer)}
        if steps <= self._held.tensors:
            check_optimizers(self._held.module, [optimizer], {})
            for former in self._steps.waited_for:
                if steps.issuperset(id(t) for t in trained_by(former)):
                    self._steps.forget(former)
            return True
        if steps & {id(t) for t in self._held.module.parameters()}:
            raise UnsupportedModel(
                f"the script has made a {type(optimizer).__name__} after its first step that trains more of the model "
                f"than was trained then: it would differ between workers. {ALTERNATIVE}"
            )
        log.warning("what a new %s trains is not in the run, and stays this worker's own", type(optimizer).__name__)
        self._leave_out(optimizer)
        return False

    def _leave_out(self, optimizer: torch.optim.Optimizer) -> None:
        self._strangers[optimizer] = 0
        self._steps.forget(optimizer)

    def _bear_with(self, optimizer: torch.optim.Optimizer) -> None:
        """One whose steps do not count has stepped. Raises UnsupportedModel if it trains a module while the training
        that is in the run is over, as it seems."""
        assert self._held is not None
        self._strangers[optimizer] += 1
        if self._strangers[optimizer] == PATIENCE and (modules := modules_of(optimizer)):
            raise UnsupportedModel(
                f"what {self._held.kinds} trains is in the run, and has not stepped while {type(optimizer).__name__}, "
                f"made later, took {PATIENCE} steps with another module ({', '.join(modules)}), which this worker "
                f"would train alone. {ALTERNATIVE}"
            )

    # -- training --

    def _count(self, outer: Outer) -> None:
        """An inner step is over."""
        self._strangers.update(dict.fromkeys(self._strangers, 0))
        options = self._launch.options
        if options.tokens_per_step is not None:
            outer.report(tokens=options.tokens_per_step)
        self._clock.step()
        if outer.closed:  # on SIGTERM, in a script that handles it and goes on
            self._over = True
        elif outer.should_stop:
            self._leave(outer)
            if options.stop == "exit":
                log.warning("the script ends here; --stop continue would let it go on alone")
                raise SystemExit(0)
            log.warning("the script goes on alone, from the global parameters")

    # -- the end --

    def before_destroy(self, group: Any) -> None:
        """The script ends its process group, without which the ranks of an island cannot flush."""
        if self._outer is not None and group in (None, dist.group.WORLD):
            self._end(failure(sys.exc_info()[1]))

    def _end(self, error: BaseException | None) -> None:
        """The script has ended."""
        if self._failure:
            if error is None:  # it has caught ours
                raise SystemExit(self._failure)
        elif self._outer is not None and not self._over:
            if error is not None:
                self._over = True
                self._outer.__exit__(type(error), error, None)
                log.warning("the script has failed (%s): it leaves the run without a flush", type(error).__name__)
                return
            try:
                self._leave(self._outer)
            except (DilocoError, OSError) as failed:
                self._fail(failed)

    def _leave(self, outer: Outer) -> None:
        """Flush, write the global parameters if they are wanted, and leave the run."""
        self._over = True
        if outer.closed:  # on SIGTERM
            return
        with outer:
            outer.flush(together=self._launch.options.together)
            if self._launch.options.export is not None:
                self._export(outer, self._launch.options.export)
        stats = outer.stats
        log.info(
            "flushed after %d inner steps: %d contributions counted, %d not; %.1f MB up, %.1f MB down; stalled %.1f s",
            stats.steps,
            stats.counted,
            stats.not_counted,
            stats.bytes_up / 1e6,
            stats.bytes_down / 1e6,
            stats.stall_seconds,
        )

    def _export(self, outer: Outer, path: Path) -> None:
        """Write the model's state_dict with θ in it to a safetensors file; where it is sharded, what the server has."""
        assert self._held is not None
        values = outer.global_state_dict().values()  # collective in an island
        if _distributed() and dist.get_rank() != 0:
            return
        state = {name: t for name, t in zip(self._held.root.state_dict(), values, strict=True) if torch.is_tensor(t)}
        if any(hasattr(t, "full_tensor") for t in state.values()):
            launch, options = self._launch, self._launch.options
            export(
                launch.address,
                path,
                options.connect_timeout,
                token=options.token,
                ca_cert=launch.ca_cert,
                client_cert=launch.client_cert,
                client_key=launch.client_key,
            )
        else:
            temporary = path.with_name(path.name + ".tmp")
            save_file({name: t.contiguous() for name, t in state.items()}, temporary, metadata={"format": "pt"})
            temporary.replace(path)
        log.info("the global parameters are in %s", path)

    def _fail(self, error: Exception) -> None:
        self._failure, self._over = f"diloco: {type(error).__name__}: {error}", True
        if self._outer is not None:
            self._outer.__exit__(type(error), error, None)
        _take_mark()
        if threading.current_thread() is not threading.main_thread():
            leave(SystemExit(self._failure))
        sys.exit(self._failure)


def _take_mark() -> None:
    """A process of the command has trained: it need not be warned that none has."""
    with suppress(OSError):
        Path(os.environ.get(MARK_VARIABLE, "")).unlink()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
