"""Settings of a command: each stands once, as a field of a dataclass with its type, bounds and help text."""

import argparse
import operator
import sys
from collections.abc import Mapping
from dataclasses import Field, field, fields, make_dataclass
from typing import Any, get_type_hints

from .errors import UserError

# Key of a field's metadata, what must hold between a value and the bound, and the words for it.
BOUNDS = (
    ("low", operator.ge, "at least"),
    ("above", operator.gt, "above"),
    ("high", operator.le, "at most"),
    ("below", operator.lt, "below"),
)


def setting(default: Any, help: str, *, low: float | None = None, above: float | None = None,
            high: float | None = None, below: float | None = None) -> Any:  # fmt: skip
    """A dataclass field with its `--help` text and the bounds of its number, or of each number of a list.

    Parameters
    ----------
    low, high : float
        Smallest and largest value that is allowed.
    above, below : float
        Bounds that are not allowed themselves.
    """
    metadata = {"help": help, "low": low, "above": above, "high": high, "below": below}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_bounds(settings: Any) -> None:
    """Refuse numbers outside the bounds of their fields.

    Raises
    ------
    UserError
        Naming the flag, the value and the bound; NaN is refused wherever there is a bound.
    """
    for each in fields(settings):
        value = getattr(settings, each.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            for key, holds, words in BOUNDS:
                bound = each.metadata.get(key)
                if bound is not None and not holds(number, bound):
                    raise UserError(f"--{each.name} is {number}: give a number {words} {bound}.")


def given_flags(argv: list[str] | None, renamed: Mapping[str, str] | None = None) -> set[str]:
    """Names of the flags on a command line, under their present names."""
    words = sys.argv[1:] if argv is None else argv
    names = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    return {(renamed or {}).get(name, name) for name in names}


def parse_settings(
    kind: type,
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    positional: tuple[str, ...] = (),
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Any:
    """Read the flags of a command into its dataclass of settings; bounds are checked.

    Parameters
    ----------
    kind : type
        The dataclass; its fields are made by `setting`. `Literal` types become choices.
    argv : list of str, optional
        Flags; those of the command line if not given.
    positional : names
        Fields that may also be given without a flag, in this order; one that is a list takes several words.
    presets : mapping, optional
        Named defaults; the field `preset` says which are used. Flags go over the preset's, those over the class's.
    renamed : mapping, optional
        Old flags that are accepted for one release, to their new names.

    Raises
    ------
    UserError
        An unknown preset, or a number outside its bounds. Unknown flags end with argparse's message and status 2.
    """
    from transformers import HfArgumentParser  # takes a second to import, which `--help` of other commands can spare

    argv = list(sys.argv[1:] if argv is None else argv)
    for index, flag in enumerate(argv):
        name, equals, value = flag.partition("=")
        new = (renamed or {}).get(name.removeprefix("--")) if name.startswith("--") else None
        if new:
            sys.stderr.write(f"{prog}: {name} is now called --{new}; the old name will go with the next release.\n")
            argv[index] = f"--{new}{equals}{value}"
    parser = HfArgumentParser(
        _for_argparse(kind), prog=prog, description=description, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    for name in positional:
        many = isinstance(parser.get_default(name), list)
        parser.add_argument(f"_{name}", metavar=name, nargs="*" if many else "?", help=f"same as --{name}")
    if presets is not None:
        quiet = [flag for flag in argv if flag not in ("-h", "--help")]
        preset = parser.parse_known_args(quiet)[0].preset
        if preset not in presets:
            raise UserError(f"--preset is {preset!r}: use one of {', '.join(presets)}.")
        parser.set_defaults(**presets[preset])
    namespace = parser.parse_args(argv)
    for name in positional:
        given = getattr(namespace, f"_{name}")
        if given:
            setattr(namespace, name, given)
    settings = kind(**{each.name: getattr(namespace, each.name) for each in fields(kind)})
    check_bounds(settings)
    return settings


def _for_argparse(kind: type) -> type:
    """The same fields with help texts alone: HfArgumentParser hands all metadata to argparse, which formats "%"."""
    hints = get_type_hints(kind)

    def plain(each: Field) -> Field:
        texts = {"help": each.metadata["help"].replace("%", "%%")}
        return field(default=each.default, default_factory=each.default_factory, metadata=texts)

    return make_dataclass(kind.__name__, [(each.name, hints[each.name], plain(each)) for each in fields(kind)])
