"""wsdino.settings: a command's flags are its dataclass, with choices, bounds, presets and renamed flags."""

from dataclasses import dataclass
from typing import Literal

import pytest

from wsdino.errors import UserError
from wsdino.settings import check_bounds, parse_settings, setting


@dataclass
class Baking:
    recipe: str | None = setting(None, "Recipe to read.")
    preset: str = setting("bread", "Named defaults.")
    oven: Literal["gas", "wood"] = setting("gas", "Kind of oven.")
    loaves: int = setting(2, "Loaves per batch.", low=1, high=100)
    salt: float = setting(0.02, "Share of salt, 100 % of flour.", above=0, below=1)
    sizes: list[float] = setting([1.0, 2.0], "Sizes in kilograms.", above=0)
    seed: int | None = setting(None, "Seed of the shuffling.", low=0)
    crust: bool = setting(True, "Bake a crust.")


PRESETS = {"bread": {}, "cake": {"salt": 0.001, "loaves": 1, "sizes": [0.5]}}


def parse(*words, **options):
    options = {"positional": ("recipe",), "presets": PRESETS, "renamed": {"number": "loaves"}, **options}
    return parse_settings(Baking, list(words), prog="bake", description="Bakes.", **options)


def test_without_flags_the_class_s_defaults_are_used():
    assert parse() == Baking() and parse().sizes is not Baking().sizes


def test_flags_go_over_the_preset_and_the_preset_over_the_class():
    assert parse("--preset", "cake") == Baking(preset="cake", salt=0.001, loaves=1, sizes=[0.5])
    assert parse("--loaves", "7", "--preset=cake").loaves == 7


def test_every_type_is_read():
    found = parse("rye.txt", "--oven", "wood", "--sizes", "1", "2.5", "--seed", "3", "--crust", "False")
    assert found == Baking(recipe="rye.txt", oven="wood", sizes=[1.0, 2.5], seed=3, crust=False)
    assert parse("--recipe", "rye.txt") == parse("rye.txt")


@pytest.mark.parametrize("words", [["--number", "5"], ["--number=5"]])
def test_a_renamed_flag_is_accepted_with_a_word_about_it(capsys, words):
    assert parse(*words).loaves == 5
    said = capsys.readouterr().err
    assert "--number" in said and "--loaves" in said and said.count("\n") == 1
    assert parse("number").recipe == "number", "only a flag is renamed"


@pytest.mark.parametrize(
    "words", [["--oven", "solar"], ["--loaves", "many"], ["--loafs", "3"], ["--loa", "3"], ["--salt"]]
)
def test_what_argparse_refuses_is_status_2_and_names_the_flag(capsys, words):
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(UserError, match="--preset is 'pie': .*bread.*cake"):
        parse("--preset", "pie")


BOUNDS = {
    "loaves": (["1", "100"], ["0", "-1", "101"]),
    "salt": (["1e-9", "0.999"], ["0", "1", "-1", "nan", "inf", "-inf"]),
    "sizes": (["0.1", "inf"], ["0", "nan"]),
    "seed": (["0"], ["-1"]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name):
    allowed, refused = BOUNDS[name]
    for value in allowed:
        parse(f"--{name}={value}")
    for value in refused:
        with pytest.raises(UserError, match=f"--{name} is "):
            parse(f"--{name}={value}")


def test_each_number_of_a_list_is_checked_and_the_message_names_value_and_bound():
    with pytest.raises(UserError, match="--sizes is -0.5: .* above 0"):
        check_bounds(Baking(sizes=[1.0, -0.5]))
    with pytest.raises(UserError, match="--loaves is 1000001: .* at most 100"):
        check_bounds(Baking(loaves=1_000_001))
    check_bounds(Baking(seed=None, crust=True))


def test_help_shows_each_flag_with_its_default_and_choices(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--preset", "cake", "--help")
    said = capsys.readouterr().out
    assert ended.value.code == 0 and said.startswith("usage: bake")
    for words in ("--oven {gas,wood}", "Share of salt, 100 % of flour. (default: 0.001)", "(default: gas)"):
        assert words in " ".join(said.split())
