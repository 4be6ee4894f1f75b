"""The one error for users, and the decorator that turns it into one sentence and exit status 2."""

import errno
import functools
import sys
from collections.abc import Callable

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


def command(name: str) -> Callable:
    """Decorate `main(argv=None)` of a command called `name`.

    A `UserError`, and an `OSError` about a path, become `<name>: error: <sentence>` on standard error and exit
    status 2; Ctrl-C becomes status 130. Every other error is a defect and keeps its traceback.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def run(argv: list[str] | None = None):
            try:
                return main(argv)
            except UserError as error:
                sentence, status = str(error), 2
            except OSError as error:
                if error.errno not in PATH_ERRORS:
                    raise
                # A file that is already open has no name in the error of a full disk.
                place = error.filename or "An output file"
                sentence, status = f"{place} cannot be read or written: {error.strerror}.", 2
            except KeyboardInterrupt:
                sys.exit(130)
            sys.stderr.write(f"{name}: error: {sentence}\n")
            sys.exit(status)

        return run

    return decorate
