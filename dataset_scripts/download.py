"""Fetches plate archives and tables over HTTP: in parallel, resumable, verified by size, CRC and a manifest of hashes.

The layout is that of the public BBBC021 v1: the three tables beside one zip a plate,
`BBBC021_v1_images_<plate>.zip`. A broken connection goes on where it stopped (HTTP Range) where the server allows
it, and starts again where it does not; a truncated or corrupted archive is fetched anew.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from .screen import ScreenError

BBBC021_URL = "https://data.broadinstitute.org/bbbc/BBBC021/"
TABLES = ("BBBC021_v1_image.csv", "BBBC021_v1_moa.csv", "BBBC021_v1_compound.csv")
BLOCK = 1 << 20

# What an archive may hold, unpacked. A plate of BBBC021 is 720 images of 2.6 MB, 1.9 GB, about twice its archive.
MAX_IMAGE_BYTES = 2**28
MAX_PLATE_BYTES = 2**35
MAX_RATIO, RATIO_FROM = 20, 2**30  # times its archive, once it is larger than the second


class _Gone(Exception):
    """The server answers, and has no such file."""


class Downloader:
    """Fetches files of one base URL into one folder.

    Parameters
    ----------
    base_url : str
        Folder of the tables and archives.
    folder : path
        Where they go; holds `archives.json`, the hashes of everything first fetched.
    attempts : int
        Times a file is tried before giving up.
    pause : float
        Seconds before the second attempt, doubled each time.
    timeout : float
        Seconds without a byte after which a connection counts as broken.
    tick : callable
        Called with the number of bytes received (negative when a file starts again).
    """

    def __init__(
        self,
        base_url: str,
        folder,
        attempts: int = 6,
        pause: float = 1.0,
        timeout: float = 60.0,
        tick: Callable[[int], None] = lambda count: None,
    ):
        if urllib.parse.urlparse(base_url).scheme not in ("http", "https"):
            raise ScreenError(f"--base_url {base_url!r} is not a http(s) address: give the folder's address")
        self.base_url = base_url.rstrip("/") + "/"
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.attempts, self.pause, self.timeout, self.tick = attempts, pause, timeout, tick
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._begun: set[str] = set()
        self._manifest = self.folder / "archives.json"

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """Bytes of each file on the server, None for a file that it does not have."""
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(names, pool.map(self._size, names), strict=True))

    def fetch(self, name: str, check: Callable[[Path], None] | None = None) -> Path:
        """Fetch one file unless a copy that agrees with the manifest is there.

        One that the manifest does not know, and that `check` can judge, counts as received so far: it may have been
        brought by hand. Any other copy stays until the new one is whole.

        Parameters
        ----------
        name : str
            Of the file, under the base URL.
        check : callable, optional
            Raises `ValueError` or `zipfile.BadZipFile` for bad content, which is then fetched again.
        """
        target = self.folder / name
        if self.holds(name):
            return target
        if target.is_file() and self.known(name) is None and check is not None:
            os.replace(target, self._partial(name))
        problem = "no answer"
        for attempt in range(self.attempts):
            if attempt:
                self.stopped.wait(self.pause * 2 ** (attempt - 1))
            if self.stopped.is_set():
                raise ScreenError(f"{name}: stopped")
            try:
                partial = self._receive(name)
            except _Gone as error:
                raise ScreenError(f"{self.base_url}{name} does not exist ({error}): check --base_url") from error
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an impossible length
                problem = str(error) or type(error).__name__
                continue
            try:
                if check is not None:
                    check(partial)
            except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                if isinstance(error, ScreenError):
                    partial.unlink()
                    raise
                problem = f"its content is truncated or corrupted: {error}"
                self.tick(-partial.stat().st_size)
                partial.unlink()
                continue
            digest = _digest(partial)
            if self.known(name) not in (None, digest):
                partial.unlink()
                raise ScreenError(
                    f"{self.base_url}{name} differs from the copy first fetched (see {self._manifest}): "
                    f"find out which is right, and take {name} out of that file to accept the new one"
                )
            self._remember(name, digest)
            os.replace(partial, target)
            return target
        raise ScreenError(
            f"{self.base_url}{name} could not be fetched in {self.attempts} attempts ({problem}): run the command "
            "again to go on where it stopped"
        )

    def known(self, name: str) -> dict | None:
        """Size and sha256 of a file as first fetched."""
        with self._lock:
            return self._hashes().get(name)

    def holds(self, name: str) -> bool:
        """Whether the file is there as it was first fetched."""
        return (self.folder / name).is_file() and self.known(name) == _digest(self.folder / name)

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial"

    def _hashes(self) -> dict[str, dict]:
        try:
            return dict(json.loads(self._manifest.read_text())) if self._manifest.is_file() else {}
        except (ValueError, TypeError) as error:
            raise ScreenError(
                f"{self._manifest}, the hashes of what was first fetched, is damaged ({error}): remove it to trust "
                "what is fetched from now on"
            ) from error

    def _remember(self, name: str, digest: dict) -> None:
        with self._lock:
            manifest = self._hashes()
            manifest[name] = digest
            partial = self._manifest.with_name(self._manifest.name + ".partial")
            partial.write_text(json.dumps(manifest, indent=1, sort_keys=True))
            os.replace(partial, self._manifest)

    def _open(self, name: str, method: str = "GET", start: int = 0):
        headers = {"User-Agent": "wsdino", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(self.base_url + urllib.parse.quote(name), headers=headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (403, 404, 410):
                raise _Gone(f"HTTP {error.code}") from error
            raise

    def _size(self, name: str) -> int | None:
        for attempt in range(self.attempts):
            try:
                with self._open(name, "HEAD") as answer:
                    return int(answer.headers.get("Content-Length") or 0)
            except _Gone:
                return None
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = error
                time.sleep(0 if attempt + 1 == self.attempts else self.pause * 2**attempt)
        raise ScreenError(f"{self.base_url} does not answer ({problem}): check the address and the network")

    def _receive(self, name: str) -> Path:
        """One attempt: goes on from `<name>.partial`; returns it when its length is what the server says."""
        partial = self._partial(name)
        start = partial.stat().st_size if partial.is_file() else 0
        if name not in self._begun:
            self._begun.add(name)
            self.tick(start)  # received by an earlier run
        try:
            answer = self._open(name, start=start)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # nothing left to send, or a partial file longer than the file
                raise
            total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
            if total == str(start):
                return partial
            partial.unlink()
            self.tick(-start)
            raise OSError("the partial copy was longer than the file") from error
        with answer:
            length = answer.headers.get("Content-Length")
            if start and answer.status != 206:  # Range ignored: the whole file comes
                self.tick(-start)
                start = 0
            total = None if length is None else start + int(length)
            received = start
            with open(partial, "ab" if start else "wb") as file:
                while block := answer.read(BLOCK):
                    if self.stopped.is_set():
                        raise OSError("stopped")
                    file.write(block)
                    received += len(block)
                    self.tick(len(block))
        if total is not None and received != total:
            raise OSError(f"the connection broke after {received:,} of {total:,} bytes")
        return partial


def archive_name(plate: str) -> str:
    """Name of a plate's archive in the public layout."""
    return f"BBBC021_v1_images_{plate}.zip"


def check_archive(path: Path) -> None:
    """Raise `zipfile.BadZipFile` for a damaged archive, `ScreenError` for one that it would be unsafe to unpack.

    Damaged: a member's CRC is wrong. Unsafe: a path leads out of its folder, two images have one name, a member is
    encrypted, or it is a decompression bomb: more than 256 MiB (`MAX_IMAGE_BYTES`) in one member, more than 32 GiB
    (`MAX_PLATE_BYTES`) in all, or more than 1 GiB and 20 times the archive. The sizes are those that the archive
    states; unpacking stops there. All this is known before anything is unpacked.
    """
    with zipfile.ZipFile(path) as archive:
        _safe_members(path, archive)
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} has a wrong CRC")


def extract_archive(path: Path, folder: Path) -> None:
    """Unpack the images of a safe archive (see :func:`check_archive`) into `folder`, flat: complete, or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    with zipfile.ZipFile(path) as archive:
        for name, member in _safe_members(path, archive).items():
            with archive.open(member) as source, open(partial / name, "xb") as target:
                shutil.copyfileobj(source, target, BLOCK)
    os.replace(partial, folder)


def _safe_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The images of an archive by the names they get."""
    refused = "do not use this archive"
    images: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        inside = PurePosixPath(member.filename.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts or ":" in str(inside).split("/")[0]:
            raise ScreenError(f"{path} holds the path {member.filename!r}, which leads out of its folder: {refused}")
        if member.flag_bits & 1:
            raise ScreenError(f"{path}: {member.filename!r} is encrypted: give archives without a password")
        if member.file_size > MAX_IMAGE_BYTES:
            raise ScreenError(
                f"{path}: {member.filename!r} is {member.file_size:,} bytes unpacked, and {MAX_IMAGE_BYTES:,} is the "
                f"most for one file: {refused}"
            )
        if member.is_dir() or not inside.name.lower().endswith((".tif", ".tiff", ".png")):
            continue
        if inside.name in images:
            raise ScreenError(f"{path} holds two images named {inside.name!r}: {refused}")
        images[inside.name] = member
    total, size = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    most = min(MAX_PLATE_BYTES, max(RATIO_FROM, MAX_RATIO * size))
    if total > most:
        raise ScreenError(
            f"{path}: {size:,} bytes unpack to {total:,}, and {most:,} is the most for its size: {refused}"
        )
    return images


def _digest(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(4 * BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
