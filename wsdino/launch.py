"""Processes of one launch: as many work together as were asked for, they agree, and none waits for ever."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from .errors import UserError, sentence_for_user
from .launcher import check_launcher, processes_wanted

# While one process downloads a dataset or evaluates, the others wait for hours rather than fail.
PATIENCE = timedelta(days=1)
ECHO = 5.0  # seconds in which torchrun passes a signal on


def start_processes(script: str) -> PartialState:
    """Join the processes that were launched together.

    Parameters
    ----------
    script : str
        Name of the command in the message, such as "train_accelerate.py".

    Raises
    ------
    UserError
        Fewer processes work together than were asked for, with the command that works.
    """
    check_launcher(script)
    wanted = processes_wanted()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    if state.num_processes != wanted:
        raise UserError(f"{wanted} processes were launched but {state.num_processes} work together.")
    return state


def on_main_process(state: PartialState | Accelerator, work: Callable[[], Any]) -> Any:
    """Run `work()` on the main process and return its result on every process.

    What it raises is raised on every process, so that none waits: what is for the user as a `UserError`, any other
    error by its class and message, since not every exception survives the way to another process.
    """
    answer, problem = None, None
    if state.is_main_process:
        try:
            answer = work()
        except Exception as error:
            if state.num_processes == 1:
                raise
            problem = (sentence_for_user(error), f"{type(error).__name__}: {error}")
    answer, problem = broadcast_object_list([answer, problem])
    if problem is not None:
        for_user, defect = problem
        raise UserError(for_user) if for_user else RuntimeError(f"the main process failed: {defect}")
    return answer


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_threads(asked: int | None) -> None:
    """Set torch's threads: the asked number, or all cores for a single process that `accelerate launch` left one."""
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    if asked:
        torch.set_num_threads(asked)
    elif alone and PartialState().device.type == "cpu":
        torch.set_num_threads(usable_cores())


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of returning it to the system.

    A training step frees and takes gigabytes; fresh pages cost up to five times what reused ones do. The limits are
    those of `mallopt(3)`, set for this process alone; without glibc nothing happens.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


class Interruption:
    """Turns Ctrl-C and a cluster's SIGTERM into a flag that a loop reads between steps, so that no step is torn.

    The second signal ends the process at once with its default action. Where torchrun launched several processes, it
    passes on what the whole process group has already got: its repetition within `ECHO` seconds is the same signal.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0

    def __enter__(self) -> "Interruption":
        self._old = {kind: signal.signal(kind, self._note) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, kind: int, frame: FrameType | None) -> None:
        repeated = processes_wanted() > 1 and time.monotonic() - self._since < ECHO
        if self.signal is None:
            self.signal, self._since = kind, time.monotonic()
        elif not repeated:
            signal.signal(kind, signal.SIG_DFL)
            os.kill(os.getpid(), kind)

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._old.items():
            signal.signal(kind, handler)
