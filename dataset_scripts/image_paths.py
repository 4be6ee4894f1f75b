"""Finds the images that a table names under a folder, also where the table holds the paths of another machine."""

import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pandas as pd

from wsdino.errors import UserError

# A plane of a file with several, `field.ome.tif#2` or `plate.zarr/A/1/0/0#2`: its page, counted from 0.
PAGE = re.compile(r"(.+\.tiff?|.+\.zarr/.+)#(\d+)", re.IGNORECASE)
GUID = re.compile(r"[0-9A-F]{8}-([0-9A-F]{4}-){3}[0-9A-F]{12}", re.IGNORECASE)


def file_and_page(path: str) -> tuple[str, int | None]:
    """The file that a path names, and its page where the path names one."""
    match = PAGE.fullmatch(path) if "#" in path else None
    return (match[1], int(match[2])) if match else (path, None)


def portable_path(text: str) -> str:
    r"""A path without what only one machine knows: drive, scheme, server or bucket, and steps upwards.

    >>> [portable_path(path) for path in (r"C:\lab\P1\a.tif", "s3://bucket/x/P1/a.tif", r"..\P1\a.tif")]
    ['lab/P1/a.tif', 'x/P1/a.tif', 'P1/a.tif']
    """
    scheme, _, rest = text.partition("://")
    if rest and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        text = unquote(rest.partition("/")[2].partition("?")[0])
    text = re.sub(r"^/*[A-Za-z]:", "", text.replace("\\", "/"))
    parts: list[str] = []
    for part in text.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


class ImageFinder:
    """Finds files under `raw` by the longest end of their path that exists there.

    A shortened path must not lead to another plate. It is refused where the folder it was found in is called like the
    one that the table names but for its digits, and, in a screen of several plates, where the plate's name is left out
    and nothing else tells plates apart: neither the place nor a GUID in the file's name.

    Parameters
    ----------
    raw : path
        Folder of the images.
    several_plates : bool
        Whether the screen has more than one.
    """

    def __init__(self, raw: str | Path, several_plates: bool):
        self.raw, self.several_plates = Path(raw), several_plates
        self.shortened: dict[str, Path] = {}  # path in the table -> where it was found
        self._above = self.raw.resolve().parts
        self._names: dict[str, frozenset[str]] = {}
        self._tails: dict[tuple[str, str], list[tuple[str, bool]]] = {}

    def find(self, file: str, plate: str) -> Path | None:
        """Where a file of a plate lies; None where it is absent.

        Parameters
        ----------
        file : str
            A portable path.
        plate : str
        """
        inside, page = file_and_page(file)
        if page is not None:
            found = self.find(inside, plate)
            return found and found.with_name(f"{found.name}#{page}")
        folder, _, name = file.rpartition("/")
        if (folder, plate) not in self._tails:
            self._tails[folder, plate] = list(self._possible(folder, plate))
        for tail, told_apart in self._tails[folder, plate]:
            if name in self._listing(tail) and (told_apart or self._names_plate(name, plate) or GUID.search(name)):
                path = self.raw / tail / name
                if tail != folder:
                    self.shortened[file] = path
                return path
        return None

    def _possible(self, folder: str, plate: str):
        """Ends of a folder's path, longest first, and whether the place tells the plate from others."""
        parts = PurePosixPath(folder).parts
        for dropped in range(len(parts) + 1):
            tail = "/".join(parts[dropped:])
            if not self._listing(tail) or self._sibling(parts[:dropped]):
                continue
            named = any(self._names_plate(part, plate) for part in parts[:dropped])
            kept = any(self._names_plate(part, plate) for part in (*parts[dropped:], *self._above))
            yield tail, kept or not named or not self.several_plates

    def _sibling(self, dropped: tuple[str, ...]) -> bool:
        """Whether the raw folder's own path says something else than what is dropped, in digits alone."""
        for ours, theirs in zip(reversed(self._above), reversed(dropped), strict=False):
            if ours != theirs:
                return re.sub(r"\d+", "#", ours) == re.sub(r"\d+", "#", theirs)
        return False

    def _names_plate(self, text: str, plate: str) -> bool:
        return re.search(rf"(?<![A-Za-z0-9]){re.escape(plate)}(?![A-Za-z0-9])", text) is not None

    def _listing(self, tail: str) -> frozenset[str]:
        if tail not in self._names:
            folder = self.raw / tail
            self._names[tail] = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
        return self._names[tail]


def find_images(
    fields: pd.DataFrame, raw: str | Path, channels: list[str], allow_missing: bool, several_plates: bool
) -> tuple[pd.DataFrame, dict[str, Path]]:
    """Look for every image once.

    Parameters
    ----------
    fields : pandas.DataFrame
        Rows of `dataset_scripts.screen.read_screen`.
    raw : path
        Folder of the images.
    channels : list of str
    allow_missing : bool
        A missing channel is no error, and fields without any image are left out.
    several_plates : bool
        Whether the screen, of which `fields` may be a part, has more than one plate.

    Returns
    -------
    fields : pandas.DataFrame
        With one `<channel>_path` per channel, "" where the image is absent.
    shortened : dict
        Paths of the table that were found by their end alone, and where.

    Raises
    ------
    UserError
        An image is absent, all are, or two rows lead to one file.
    """
    finder, fields = ImageFinder(raw, several_plates), fields.copy()
    for channel in channels:
        pairs = zip(fields[f"{channel}_file"].tolist(), fields["plate"].tolist(), strict=True)
        fields[f"{channel}_path"] = [str(finder.find(file, plate) or "") if file else "" for file, plate in pairs]
    paths = fields[[f"{channel}_path" for channel in channels]]
    found = paths.stack().rename("path").reset_index().drop_duplicates(["level_0", "path"])
    twice = found[(found["path"] != "") & found["path"].duplicated(keep=False)]
    if len(twice):
        one, two = twice["level_0"][twice["path"] == twice["path"].iloc[0]][:2]
        raise UserError(
            f"{fields.loc[one, 'table']}: lines {fields.loc[one, 'row']} and {fields.loc[two, 'row']} both lead to "
            f"{twice['path'].iloc[0]}: keep the folders that the table names"
        )
    absent = paths == ""
    if absent.to_numpy().any() and not allow_missing:
        row = fields.index[absent.any(axis=1).to_numpy()][0]
        channel = next(c for c in channels if absent.loc[row, f"{c}_path"])
        name = fields.loc[row, f"{channel}_file"] or f"(none named for {channel})"
        raise UserError(
            f"{name} ({fields.loc[row, 'table']}, line {fields.loc[row, 'row']}) is not in {raw}; "
            f"{int(absent.to_numpy().sum()):,} of {absent.size:,} images are absent: give the folder that holds them, "
            "or pass --allow_missing to build what is there"
        )
    fields = fields[~absent.all(axis=1)].reset_index(drop=True)
    if fields.empty:
        raise UserError(f"{raw} holds none of the {absent.size:,} images that the table names: check --raw")
    return fields, finder.shortened
