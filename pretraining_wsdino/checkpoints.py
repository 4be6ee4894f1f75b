"""Checkpoints of one channel: written whole, pruned, and restored together; damaged ones are set aside."""

import shutil

from accelerate import Accelerator
from accelerate.utils import gather_object

from wsdino.errors import UserError
from wsdino.files import read_json, remove, write_json
from wsdino.launch import on_main_process
from wsdino.run_folder import RunFolder


class Checkpoints:
    """Checkpoints of everything that the accelerator has prepared or registered.

    Parameters
    ----------
    run : RunFolder
    channel : str
    accelerator : Accelerator
    keep : int
        How many stay; older ones are deleted once a newer one is whole.
    global_batch : int
        Pairs per step over all processes, which a resumed run must keep.
    """

    def __init__(self, run: RunFolder, channel: str, accelerator: Accelerator, keep: int, global_batch: int):
        self.run, self.channel, self.accelerator = run, channel, accelerator
        self.keep, self.global_batch = keep, global_batch

    @property
    def newest(self) -> str:
        """Path of the newest whole checkpoint in words, for messages."""
        whole = self.run.checkpoints(self.channel)
        return str(whole[0]) if whole else "none"

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` beside its name and rename it, then prune the older ones.

        Raises
        ------
        UserError
            On every process, if any of them cannot write it.
        """
        target = self.run.checkpoint(self.channel, step)
        partial = target.with_name(target.name + ".partial")
        if self.accelerator.is_main_process:
            remove(partial)
        self.accelerator.wait_for_everyone()
        problem = None
        try:
            self.accelerator.save_state(str(partial))
        except Exception as error:  # the writers of a full disk's files raise errors of their own, not OSError
            problem = f"{type(error).__name__}: {error}"
        problem = next(filter(None, gather_object([problem])), None)  # of any process, so that none waits for it
        if problem:
            raise UserError(
                f"{partial} could not be written ({problem}); the newest whole checkpoint is {self.newest}: "
                "make room and give --resume."
            )

        def complete() -> None:
            write_json(partial / "progress.json", {"step": step, "global_batch": self.global_batch})
            remove(target)
            partial.replace(target)
            for old in self.run.checkpoints(self.channel)[self.keep :]:
                shutil.rmtree(old)

        on_main_process(self.accelerator, complete)

    def restore(self) -> int:
        """Load the newest checkpoint that all processes can read.

        Damaged newer checkpoints are renamed; otherwise pruning would keep them, as the newest, and delete good ones.

        Returns
        -------
        int
            Steps that were done; 0 where there is no checkpoint.

        Raises
        ------
        UserError
            Every checkpoint is damaged, or was trained with another number of pairs per step.
        """
        problem, damaged = None, []
        names = on_main_process(
            self.accelerator, lambda: [folder.name for folder in self.run.checkpoints(self.channel)]
        )
        for name in names:
            folder, found, problem = self.run.path / self.channel / "checkpoints" / name, None, None
            try:
                progress = read_json(folder / "progress.json", needs=("step", "global_batch"), fix="remove it")
                found = progress["step"], progress["global_batch"]
                self.accelerator.load_state(str(folder))
            except Exception as error:  # whatever a damaged file raises, the next older checkpoint is the way out
                problem = f"{type(error).__name__}: {error}"
            # All processes take or skip it together, by what the main process found.
            outcomes = gather_object([(found, problem)])
            problem = next((problem for _, problem in outcomes if problem), None)
            if problem and problem.split(":")[0].endswith("MemoryError"):
                raise UserError(f"{folder} does not fit into memory ({problem}): make room and give --resume.")
            if problem:
                self.accelerator.print(f"{folder} is damaged and skipped ({problem}).")
                damaged.append(folder)
                continue
            step, before = outcomes[0][0]
            if before != self.global_batch:
                raise UserError(
                    f"{folder} was trained with {before} pairs per step and this launch makes {self.global_batch} "
                    "(processes x --per_device_train_batch_size x --gradient_accumulation_steps): make them equal."
                )

            def set_aside() -> None:
                for each in damaged:
                    aside = each.with_name(each.name + ".damaged")
                    remove(aside)
                    each.rename(aside)

            on_main_process(self.accelerator, set_aside)
            return step
        if damaged:
            raise UserError(
                f"{damaged[0].parent} holds no checkpoint that every process can read ({problem}): put --output_dir "
                "on a disk that all machines share, or remove that folder to start the channel again."
            )
        return 0
