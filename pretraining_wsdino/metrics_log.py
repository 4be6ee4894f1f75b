"""metrics.jsonl of one channel: one line per logged step, and the trackers that were asked for."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from wsdino.errors import UserError
from wsdino.files import write_text


class MetricsLog:
    """The log of one channel, written by the main process.

    Parameters
    ----------
    path : Path
        Its metrics.jsonl.
    accelerator : Accelerator
        With the trackers of `--report_to`.
    """

    def __init__(self, path: Path, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator

    def open(self, first_step: int) -> None:
        """Keep the lines of steps up to `first_step`; those after it will be written again."""
        if self.accelerator.is_main_process:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            write_text(self.path, "".join(line + "\n" for line in lines if logged_step(line) <= first_step))

    def append(self, line: dict[str, Any]) -> None:
        """Write one line, and its numbers to the trackers."""
        if self.accelerator.is_main_process:
            try:
                with self.path.open("a") as log:
                    log.write(json.dumps(line) + "\n")
            except OSError as error:  # the error of an open file names no file
                raise UserError(f"{self.path} cannot be written: {error.strerror}.") from error
        self.accelerator.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=line["step"])


def logged_step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that a killed run left half-written."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
