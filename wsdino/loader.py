"""Loader processes that no launch, cluster or container can turn into an endless wait."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

from .errors import UserError, first_line
from .launch import usable_cores

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where POSIX shared memory is mounted)
MARGIN = 2**20  # bytes for queues, locks and what else shares the folder


def worker_count(asked: int | None, device: torch.device) -> int:
    """Loader processes of one process: as asked; otherwise up to 8 beside a GPU, none on a CPU."""
    if asked is not None:
        return asked
    return min(8, usable_cores()) if device.type == "cuda" else 0


def ignore_first_signal(_: int) -> None:
    """Let a loader process outlive the first signal, which a cluster or terminal sends to the whole process group.

    The training process finishes its step and ends its loaders; a second signal ends them at once.
    """

    def note(kind: int, frame: FrameType | None) -> None:
        signal.signal(kind, signal.SIG_DFL)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, note)


def shared_bytes(batch: Any) -> int:
    """Bytes of a batch's tensors, which a loader process hands over through shared memory."""
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, dict):
        return sum(map(shared_bytes, batch.values()))
    return sum(map(shared_bytes, batch)) if isinstance(batch, list | tuple) else 0


def check_shared_memory(batch: Any, workers: int, processes: int, flag: str) -> None:
    """Refuse more loader processes than shared memory carries, as in a container with Docker's default 64 MB.

    Parameters
    ----------
    batch : nested tensors
        A typical one.
    workers : int
        Loader processes of each process; each holds two batches ready and makes a third.
    processes : int
        On this machine.
    flag : str
        That sets the workers.

    Raises
    ------
    UserError
        Naming /dev/shm, the megabytes there and needed, and the three ways out.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    needed = 3 * workers * processes * shared_bytes(batch) * 1.2 + MARGIN  # crops differ in size a little
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 1e6:.1f} MB free and {workers} loader processes need {needed / 1e6:.0f} MB: "
            f"start the container with --shm-size {needed / 1e9 + 1:.0f}g or --ipc=host, or give --{flag} 0."
        )


def batches(loader: DataLoader, flag: str) -> Iterator[Any]:
    """A loader's batches; a loader process that dies is one sentence.

    Raises
    ------
    UserError
        A loader process was killed or lacked memory, naming `flag`.
    """
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError) as error:
        told = str(error)
        lacking = "shared memory" in told or "No space left on device" in told or "unable to mmap" in told
        # The connection to a process that dies breaks, or torch notices its end, whichever comes first.
        dead = not isinstance(error, RuntimeError) or "killed by signal" in told or "exited unexpectedly" in told
        if not lacking and (not dead or "Caught " in told):  # an error that a loader process raised and told
            raise
        raise UserError(
            f"A loader process ended ({first_line(error)}): it was killed, or memory or {SHARED_MEMORY} is full; make "
            f"room, or give --{flag} 0."
        ) from error


def processes_here() -> int:
    """Training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
