"""Fetches files over HTTP: in parallel, resumed where a connection broke, and checked before they get their name.

A broken connection continues where it stopped (HTTP Range) where the server allows it, and starts again where it does
not. A file that its check finds damaged is fetched anew.
"""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from wsdino.errors import UserError

BLOCK = 1 << 20
GONE = (403, 404, 410)  # HTTP: the server answers, and has no such file
DAMAGE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)

Result = TypeVar("Result")


class Downloader:
    """Fetches files of one base URL into one folder.

    Parameters
    ----------
    base_url : str
        Folder of the files, http or https.
    folder : path
        Where they go; made if missing.
    attempts : int
        How often a file is tried.
    pause : float
        Seconds before the second attempt, doubled each time.
    timeout : float
        Seconds without a byte after which a connection counts as broken.
    tick : callable
        Called with the number of bytes received (negative when a file starts again).

    Attributes
    ----------
    stopped : threading.Event
        Set it to end all downloads; what was received so far is kept.

    Raises
    ------
    UserError
        The address is not one of HTTP.
    """

    def __init__(
        self,
        base_url: str,
        folder: str | Path,
        attempts: int = 6,
        pause: float = 1.0,
        timeout: float = 60.0,
        tick: Callable[[int], None] = lambda count: None,
    ):
        if urllib.parse.urlparse(base_url).scheme not in ("http", "https"):
            raise UserError(f"--base_url {base_url!r} is not a http(s) address: give the folder's address")
        self.base_url = base_url.rstrip("/") + "/"
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.attempts, self.pause, self.timeout, self.tick = attempts, pause, timeout, tick
        self.stopped = threading.Event()
        self._begun: set[str] = set()

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """Bytes of each file on the server, None for a file that it does not have."""

        def size(name: str) -> int:
            with self._open(name, "HEAD") as answer:
                return int(answer.headers.get("Content-Length") or 0)

        with ThreadPoolExecutor(8) as pool:
            return dict(zip(names, pool.map(lambda name: self._try(name, lambda: size(name)), names), strict=True))

    def fetch(self, name: str, check: Callable[[Path], None]) -> Path:
        """Fetch one file, unless a copy that passes the check is there.

        A copy that does not pass counts as received so far: another program may have broken off.

        Parameters
        ----------
        name : str
            Of the file, under the base URL.
        check : callable
            Raises an exception of `DAMAGE` for damaged content, which is then fetched again, and a `UserError` for
            content that must not be used.

        Raises
        ------
        UserError
            The server has no such file, it could not be fetched, or the check refused it.
        """
        target, partial = self.folder / name, self.folder / f"{name}.partial"
        if target.is_file():
            try:
                check(target)
                return target
            except UserError:
                raise
            except DAMAGE:
                target.replace(partial)

        def attempt() -> Path:
            self._receive(name, partial)
            try:
                check(partial)
            except DAMAGE as error:
                self.tick(-partial.stat().st_size)
                partial.unlink()
                if isinstance(error, UserError):
                    raise
                raise OSError(f"its content is truncated or corrupted: {error}") from error
            return partial.replace(target)

        path = self._try(name, attempt)
        if path is None:
            raise UserError(f"{self.base_url}{name} does not exist: check --base_url")
        return path

    def _try(self, name: str, work: Callable[[], Result]) -> Result | None:
        """What `work` returns at its first success; None where the server has no such file."""
        problem: Exception = OSError("no answer")
        for attempt in range(self.attempts):
            if attempt:
                self.stopped.wait(self.pause * 2 ** (attempt - 1))
            if self.stopped.is_set():
                raise UserError(f"{name}: stopped")
            try:
                return work()
            except UserError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an impossible length
                if isinstance(error, urllib.error.HTTPError) and error.code in GONE:
                    return None
                problem = error
        raise UserError(
            f"{self.base_url}{name} could not be fetched in {self.attempts} attempts "
            f"({str(problem) or type(problem).__name__}): check the address and the network, and run the command "
            "again to continue where it stopped"
        )

    def _open(self, name: str, method: str = "GET", start: int = 0) -> http.client.HTTPResponse:
        headers = {"User-Agent": "wsdino", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(self.base_url + urllib.parse.quote(name), headers=headers, method=method)
        return urllib.request.urlopen(request, timeout=self.timeout)

    def _receive(self, name: str, partial: Path) -> None:
        """Continue the partial file to the length that the server names."""
        start = partial.stat().st_size if partial.is_file() else 0
        if name not in self._begun:
            self._begun.add(name)
            self.tick(start)  # received by an earlier run
        try:
            answer = self._open(name, start=start)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            # Nothing is left to send, or the partial file is longer than the file.
            if (error.headers.get("Content-Range") or "").rpartition("/")[2] == str(start):
                return
            partial.unlink()
            self.tick(-start)
            raise OSError("the partial copy was longer than the file") from error
        with answer:
            length = answer.headers.get("Content-Length")
            if start and answer.status != 206:  # Range ignored: the whole file comes
                self.tick(-start)
                start = 0
            received = start
            with open(partial, "ab" if start else "wb") as file:
                while block := answer.read(BLOCK):
                    if self.stopped.is_set():
                        raise OSError("stopped")
                    received += file.write(block)
                    self.tick(len(block))
        if length is not None and received != start + int(length):
            raise OSError(f"the connection broke after {received:,} of {start + int(length):,} bytes")
