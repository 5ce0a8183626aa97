"""Python imports this when it starts, in every process of a command that `diloco-client run` has started.

It waits until somebody imports torch, and then for an optimizer's first step: a process that takes none is left as it
was, and is not made to import anything. Another `sitecustomize` is found and run as usual.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Hooks:
    """What is called from within torch in this process."""

    def __init__(self) -> None:
        self.script: Any = None

    def into_optimizers(self, module: Any) -> None:
        from torch._compile import _disable_dynamo

        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.after_step(optimizer)

        # In a script that compiles `optimizer.step()` too, this is no part of the graph.
        module.register_optimizer_step_post_hook(_disable_dynamo(after_step))

    def into_process_groups(self, module: Any) -> None:
        """Before anybody can take the function from where it is defined."""
        destroy = module.destroy_process_group

        @wraps(destroy)
        def destroy_process_group(group: Any = None) -> None:
            if self.script is not None:
                self.script.before_destroy(group)
            destroy(group)

        module.destroy_process_group = destroy_process_group

    def after_step(self, optimizer: Any) -> None:
        """Of any optimizer."""
        try:
            from diloco_client.launch.script import Script
        except ImportError as error:
            raise SystemExit(
                f"diloco: {sys.executable} cannot join a run ({error}): {sys.executable} -m pip install '.[torch]' in "
                "diloco's folder"
            ) from None
        if self.script is None:
            self.script = Script.of_this_process()
        self.script.after_step(optimizer)


class Watch:
    """Finds modules as they would be found without it, and does something as soon as they are there."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]) -> None:
        self.waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        then = self.waiting.pop(name)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            then(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def warn_unless_joined(path: str) -> None:
    """At the end of the command's own process: the file at `path` is still there if nobody has joined."""
    try:
        with open(path) as file:
            if file.read() != str(os.getpid()):
                return
        os.unlink(path)
    except OSError:
        return
    sys.stderr.write(
        "diloco: nothing has joined the run: no process of this command has taken a step with a torch optimizer. Does "
        "it train at all? What is not a torch.optim.Optimizer is not seen (docs/launcher.md)\n"
    )


def run_the_next_sitecustomize(here: str) -> None:
    spec = PathFinder.find_spec("sitecustomize", [place for place in sys.path if place != here])
    if spec is None or spec.loader is None:
        return
    module = sys.modules["sitecustomize"] = module_from_spec(spec)
    spec.loader.exec_module(module)


here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [place for place in sys.path if place != here]
if os.environ.get("DILOCO_LAUNCH"):
    hooks = Hooks()
    watch = Watch(
        {
            "torch.optim.optimizer": hooks.into_optimizers,
            "torch.distributed.distributed_c10d": hooks.into_process_groups,
        }
    )
    sys.meta_path.insert(0, watch)
    atexit.register(warn_unless_joined, os.environ.get("DILOCO_LAUNCH_MARK", ""))
run_the_next_sitecustomize(here)
