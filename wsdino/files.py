"""Files and folders: written whole or not at all, read with one sentence where they are damaged."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import UserError, first_line

PARTIAL = ".partial"


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to; it takes the name `path` when the block ends well.

    A reader never sees half of it. What stood at `path` is replaced; it is kept when the block raises. A folder cannot
    replace a folder in one step: a kill between the two renames leaves the former one as `<path>.old`, and whoever
    writes next puts it back first.
    """
    path = Path(path)
    partial, old = path.with_name(path.name + PARTIAL), path.with_name(path.name + ".old")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    if old.is_dir() and not path.exists():
        old.rename(path)
    try:
        yield partial
        if path.is_dir():
            remove(old)
            path.rename(old)
            partial.rename(path)
            remove(old)
        else:
            partial.replace(path)
    except BaseException:
        remove(partial)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder with its content; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path, *, needs: Iterable[str] = (), fix: str) -> dict:
    """Read a JSON object.

    Parameters
    ----------
    needs : names
        Keys that must be there.
    fix : str
        What the user should do about a missing or damaged file; ends the sentence.

    Raises
    ------
    UserError
        The file is absent, is not a JSON object, or lacks a key.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}: {fix}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): {fix}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: {fix}.")
    missing = [name for name in needs if name not in content]
    if missing:
        raise UserError(f"{path} lacks {missing[0]!r}: {fix}.")
    return content


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


def claim_folder(folder: str | Path, marker: str, what: str, *, ignore: Iterable[str] = ()) -> bool:
    """Whether `folder` holds what we wrote before (`marker` lies in it); False for an absent or empty folder.

    Parameters
    ----------
    marker : str
        Name of a file that only our output of this kind has.
    what : str
        What the folder is to hold, for the message.
    ignore : names
        Files that do not count as content, such as a lock.

    Raises
    ------
    UserError
        The folder has other content, which must not be mixed with ours or overwritten.
    """
    folder = Path(folder)
    if (folder / marker).exists():
        return True
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - set(ignore)):
        raise UserError(f"{folder} is not empty and holds no {what}: name another folder.")
    return False


@contextmanager
def locked(path: str | Path, sentence: str) -> Iterator[FileLock]:
    """Hold the lock file `path`, which a process that dies gives back; `UserError(sentence)` if another holds it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(sentence) from error
    try:
        yield lock
    finally:
        lock.release()
