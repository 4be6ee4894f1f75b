"""The channels of a run, trained one after another."""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

from accelerate import Accelerator

from .trainer import Trainer


def train_channels(
    channels: Sequence[str],
    make_trainer: Callable[[str], Trainer],
    begun: AbstractContextManager[None],
    accelerator: Accelerator,
    said: str,
    *,
    at_end: Callable[[], None] | None = None,
    save_initial: bool = False,
) -> bool:
    """Train every channel in turn; False when interrupted.

    Parameters
    ----------
    channels : sequence of str
    make_trainer : callable
        A channel's trainer; nothing is written by making it.
    begun : context manager
        Begins the run in its folder, and holds it: `begun_run`.
    said : str
        What is printed at the end.
    at_end : callable, optional
        Called when all are trained and the run's folder is still held.
    save_initial : bool
        Save what training starts from, for its seed alone does not give it.
    """
    with ExitStack() as held:
        for number, channel in enumerate(channels):
            trainer = make_trainer(channel)
            if number == 0:  # only now, when every setting has proved usable, is anything written
                held.enter_context(begun)
            if save_initial:
                trainer.save_initial()
            finished = trainer.train()
            # Two channels' networks and optimisers would not fit a GPU that one fits. And free them before the process
            # group: destroying DDP afterwards can deadlock, because it joins a thread that needs the GIL.
            del trainer
            gc.collect()
            if not finished:
                return False
        if at_end is not None:
            at_end()
    accelerator.print(said)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return True
