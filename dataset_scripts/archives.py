"""Plate archives of BBBC021's public layout: one zip of images per plate, fetched, checked and unpacked.

A plate is fetched and unpacked, and deleted once it is built, so the disk holds a few raw plates at a time.
"""

from __future__ import annotations

import shutil
import threading
import zipfile
from pathlib import Path, PurePosixPath

from wsdino.errors import UserError
from wsdino.files import written_whole

from .download import BLOCK, Downloader

IMAGE_SUFFIXES = (".tif", ".tiff", ".png")
UNPACKED_BASE, UNPACKED_RATIO = 2**30, 20  # bytes, and times the archive: BBBC021's unpack to twice their size


def archive_name(plate: str) -> str:
    """Name of a plate's archive in the public layout."""
    return f"BBBC021_v1_images_{plate}.zip"


def check_archive(path: Path) -> None:
    """Read an archive through, unpacking nothing.

    Raises
    ------
    zipfile.BadZipFile
        It is damaged: the CRC of a member is wrong.
    UserError
        It would be unsafe to unpack: a path leads out of its folder, two images have one name, a member is encrypted,
        or it states that it unpacks to more than 1 GiB and 20 times its size. Unpacking stops at the stated sizes.
    """
    with zipfile.ZipFile(path) as archive:
        _safe_members(path, archive)
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} has a wrong CRC")


def extract_archive(path: Path, folder: Path) -> None:
    """Unpack the images of a safe archive (see `check_archive`) into `folder`, flat: complete, or not at all."""
    with written_whole(folder) as partial, zipfile.ZipFile(path) as archive:
        partial.mkdir(parents=True)
        for name, member in _safe_members(path, archive).items():
            with archive.open(member) as source, open(partial / name, "xb") as target:
                shutil.copyfileobj(source, target, BLOCK)


def _safe_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The images of an archive by the names they get."""
    images: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        inside = PurePosixPath(member.filename.replace("\\", "/"))
        problem = None
        if inside.is_absolute() or ".." in inside.parts or ":" in str(inside).split("/")[0]:
            problem = "leads out of its folder"
        elif member.flag_bits & 1:
            problem = "is encrypted"
        elif not member.is_dir() and inside.suffix.lower() in IMAGE_SUFFIXES:
            if inside.name in images:
                problem = "has the name of another image"
            images[inside.name] = member
        if problem:
            raise UserError(f"{path}: {member.filename!r} {problem}: do not use this archive")
    total, most = sum(member.file_size for member in archive.infolist()), UNPACKED_RATIO * path.stat().st_size
    if total > max(UNPACKED_BASE, most):
        raise UserError(f"{path} unpacks to {total:,} bytes, more than {UNPACKED_RATIO} times its size: do not use it")
    return images


class PlateArchives:
    """The plates of a server: sizes, disk space, and each plate's raw images while it is built.

    Parameters
    ----------
    downloader : Downloader
    downloads : int
        Archives fetched at a time.
    keep : bool
        Keep the archives of plates that are built.
    """

    def __init__(self, downloader: Downloader, downloads: int, keep: bool):
        self.downloader, self.downloads, self.keep = downloader, downloads, keep
        self._turns = threading.Semaphore(downloads)

    def folder(self, plate: str) -> Path:
        """Where a plate's raw images are unpacked."""
        return self.downloader.folder / "plates" / plate

    def fetch(self, plate: str) -> Path:
        """Fetch, check and unpack one plate; returns the folder of its images."""
        with self._turns:
            archive = self.downloader.fetch(archive_name(plate), check_archive)
        extract_archive(archive, self.folder(plate))
        return self.folder(plate)

    def discard(self, plate: str, built: bool = True) -> None:
        """Delete a plate's raw images, and first its archive: while the folder is there, this is not done."""
        if built and not self.keep:
            (self.downloader.folder / archive_name(plate)).unlink(missing_ok=True)
        shutil.rmtree(self.folder(plate), ignore_errors=True)

    def available(self, plates: list[str], allow_missing: bool) -> dict[str, int]:
        """Bytes of the archive of every plate that the server has.

        Raises
        ------
        UserError
            It lacks a plate, unless `allow_missing`, or all of them.
        """
        names = {plate: archive_name(plate) for plate in plates}
        sizes = self.downloader.sizes(list(names.values()))
        absent = [plate for plate in plates if sizes[names[plate]] is None]
        if plates and absent and (len(absent) == len(plates) or not allow_missing):
            raise UserError(
                f"{self.downloader.base_url}{names[absent[0]]} does not exist ({len(absent)} of {len(plates)} plates "
                "are absent): check --plates and --base_url, or pass --allow_missing to go on without some"
            )
        return {plate: sizes[names[plate]] for plate in plates if sizes[names[plate]] is not None}

    def check_disk(self, output: Path, sizes: dict[str, int], workers: int) -> str:
        """Say what fetching needs.

        Parameters
        ----------
        output : path
            Folder of the dataset.
        sizes : dict
            Plate -> bytes of its archive.
        workers : int
            Plates built at a time.

        Raises
        ------
        UserError
            A disk has less space than that.
        """
        fetched, at_once = sum(sizes.values()), min(workers + self.downloads, len(sizes))
        # A guess on the safe side: unpacked TIFFs take twice their archive, and the halved, compressed planes of the
        # dataset less than half of it. Both folders may be on one disk.
        shares: dict[int, list] = {}
        raw = at_once * max(sizes.values()) * 3 + (fetched if self.keep else 0)
        for folder, share in ((self.downloader.folder, raw), (output, fetched * 0.5)):
            shares.setdefault(folder.stat().st_dev, [folder, 0])[1] += share
        disks = [(folder, needed / 1e9, shutil.disk_usage(folder).free / 1e9) for folder, needed in shares.values()]
        for folder, needed, free in disks:
            if needed > free:
                raise UserError(
                    f"{folder} has {free:,.2f} GB free and about {needed:,.2f} GB are needed: free some, give another "
                    "folder, or fetch fewer plates at a time (--plates, --downloads, --workers)"
                )
        said = " and ".join(
            f"about {needed:,.2f} GB at {folder} (free {free:,.2f} GB)" for folder, needed, free in disks
        )
        return (
            f"{len(sizes)} plates to fetch from {self.downloader.base_url}, {at_once} at a time: {fetched / 1e9:,.2f} "
            f"GB; disk space needed {said}"
        )
