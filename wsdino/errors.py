"""The one error for users, and the decorator that turns it into one sentence and exit status 2."""

import errno
import functools
import sys
from collections.abc import Callable
from typing import Any

# errno values that mean: a path that the user named cannot be read or written.
PATH_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTEMPTY),
}


class UserError(ValueError):
    """Something that the user can put right: a setting, a table, an image, a folder, a launch.

    The message is one or two whole sentences that name the file, row, column or flag and what to do about it.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def sentence_for_user(error: BaseException) -> str | None:
    """What the user should read of an error; None for a defect, which keeps its traceback.

    The message of a `UserError`, also of one that a DataLoader's worker raised, which torch puts at the end of that
    worker's traceback; a sentence for an `OSError` about a path.
    """
    if isinstance(error, UserError):
        message = str(error).strip()
        in_worker = "DataLoader worker process" in message
        return message.splitlines()[-1].partition("Error: ")[2] if in_worker else message
    if isinstance(error, OSError) and error.errno in PATH_ERRORS:
        # A file that is already open has no name in the error of a full disk.
        return f"{error.filename or 'An output file'} cannot be read or written: {error.strerror}."
    return None


def command(name: str) -> Callable:
    """Decorate `main(argv=None)` of a command called `name`.

    A `UserError`, and an `OSError` about a path, become `<name>: error: <sentence>` on standard error and exit
    status 2; Ctrl-C becomes status 130. Every other error is a defect and keeps its traceback.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> Any:
            try:
                return main(argv)
            except (UserError, OSError) as error:
                sentence = sentence_for_user(error)
                if sentence is None:
                    raise
            except KeyboardInterrupt:
                sys.exit(130)
            sys.stderr.write(f"{name}: error: {sentence}\n")
            sys.exit(2)

        return run

    return decorate
