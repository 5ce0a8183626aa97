"""Tells when a script's main program has ended, and how, while threads can still be started.

Since Python 3.12 `atexit` is too late for the network: no thread can be started any more. There the end of the main
program's outermost frame is watched instead (PEP 669), which costs nothing until then. Python 3.11 has no such thing,
but a place before `atexit` where `concurrent.futures` ends its threads.
"""

from __future__ import annotations

import atexit
import builtins
import dis
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import util
from multiprocessing.process import BaseProcess
from types import CodeType, FrameType
from typing import Any

OnEnd = Callable[[BaseException | None], None]
"""Given None after a normal end or `sys.exit(0)`, else what ended the program. May raise SystemExit."""


def call_at_end(on_end: OnEnd) -> None:
    """Call `on_end` once, when this process's main program has ended. Call it from that program.

    A process that is killed, or leaves by `os._exit`, ends without.
    """
    once = _once(on_end)
    if sys.version_info >= (3, 12):
        _watch_main(once)
    elif multiprocessing.parent_process() is not None:
        # One that was forked never returns from its main program, and has no atexit.
        util.Finalize(None, lambda: once(sys.exc_info()[1]), exitpriority=1000)
    else:
        _at_exit(once)


def failure(error: BaseException | None) -> BaseException | None:
    """What is wrong with a program that ended by `error`: nothing after `sys.exit(0)`."""
    return None if isinstance(error, SystemExit) and error.code in (None, 0) else error


def _once(on_end: OnEnd) -> OnEnd:
    called: list[bool] = []
    process = os.getpid()

    def call(error: BaseException | None) -> None:
        if called or os.getpid() != process:
            return
        called.append(True)
        on_end(failure(error))

    return call


if sys.version_info >= (3, 12):
    BOOTSTRAP = BaseProcess._bootstrap.__code__  # type: ignore[attr-defined]

    def _watch_main(on_end: OnEnd) -> None:
        """In a process of multiprocessing the main program is what its `_bootstrap` calls; that makes an exit code of
        what it raises, and of what `on_end` does."""
        frame: FrameType = sys._getframe()
        while frame.f_back is not None and frame.f_back.f_code is not BOOTSTRAP:
            frame = frame.f_back
        main = frame.f_code
        watcher, events = sys.monitoring, sys.monitoring.events
        tool = next(number for number in (4, 3, 5, 2, 1, 0) if watcher.get_tool(number) is None)

        def on_return(code: CodeType, offset: int, value: object) -> Any:
            if code is main:
                on_end(None)

        def on_unwind(code: CodeType, offset: int, error: BaseException) -> Any:
            if code is main:
                on_end(error)

        watcher.use_tool_id(tool, "diloco")
        watcher.register_callback(tool, events.PY_RETURN, on_return)
        watcher.set_local_events(tool, main, events.PY_RETURN)
        watcher.register_callback(tool, events.PY_UNWIND, on_unwind)
        watcher.set_events(tool, events.PY_UNWIND)

else:

    def _at_exit(on_end: OnEnd) -> None:
        """Whether the main program has returned, its frame still tells at exit. With which code it has not, nothing
        tells: of `sys.exit(code)` and `exit(code)` we see to it that something does, of `raise SystemExit(code)` we
        cannot."""
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
        exits: list[SystemExit] = []

        def remembering(original: Callable[..., Any]) -> Callable[..., Any]:
            def leave_with(code: Any = None) -> Any:
                if threading.current_thread() is threading.main_thread():
                    exits[:] = [SystemExit(code)]
                original(code)

            return leave_with

        def at_exit() -> None:
            returned = dis.opname[frame.f_code.co_code[frame.f_lasti]] == "RETURN_VALUE"
            try:
                on_end(None if returned else getattr(sys, "last_value", None) or (exits[-1] if exits else None))
            except SystemExit as error:
                leave(error)
            except BaseException:
                traceback.print_exc()
                leave(SystemExit(1))

        sys.exit = remembering(sys.exit)
        for name in ("exit", "quit"):  # not there with `python -S`
            if hasattr(builtins, name):
                setattr(builtins, name, remembering(getattr(builtins, name)))
        threading._register_atexit(at_exit)  # type: ignore[attr-defined]


def leave(error: SystemExit) -> None:
    """End the process with this error's exit code, from where raising it would not: so late, or outside the main
    thread."""
    if not isinstance(error.code, int):
        sys.stderr.write(f"{error.code}\n")
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.code if isinstance(error.code, int) else 1)
