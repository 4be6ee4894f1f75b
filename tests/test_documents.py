"""What the documents tell a reader to type exists: commands, flags, make targets and files."""

import importlib
import re
from pathlib import Path

import pytest

from wsdino.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*.md")} - set(ROOT.glob(".*/**/*.md")))
MODULES = {f"{name}.py": name for name in COMMANDS.values() if "." not in name}
STARTS = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:(?:accelerate launch|python) [^`\n]*?)?(?:\.venv/bin/)?"
    r"(?:wsdino-(\w+)|-m wsdino (\w+)|(\w+\.py))"
)


def typed(text):
    """Pieces of code in a document: lines of shell blocks with their continuations, and words between backticks."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def command_of(code):
    """The module of our command that a piece of code calls, and what follows its name; None for other code."""
    match = STARTS.match(code.strip())
    if not match:
        return None
    short, also, script = match.groups()
    module = COMMANDS.get(short or also) or MODULES.get(script)
    return (module, code.strip()[match.end() :].split("#")[0]) if module else None


@pytest.fixture(scope="module")
def help_of():
    """`--help` of a command, asked once."""
    known = {}

    def text(module, capsys, monkeypatch):
        if module not in known:
            capsys.readouterr()
            monkeypatch.setattr("sys.argv", [module, "--help"])
            with pytest.raises(SystemExit) as ended:
                importlib.import_module(module).main()
            assert not ended.value.code
            known[module] = capsys.readouterr().out
        return known[module]

    return text


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if path.name != "CHANGELOG.md"],  # which also names what is gone
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_commands_and_flags_exist(path, help_of, capsys, monkeypatch):
    makefile = (ROOT / "Makefile").read_text()
    for code in typed(path.read_text(encoding="utf-8")):
        for target in re.findall(r"^make ([\w-]+)", code):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), code
        called = command_of(code)
        if called:
            module, rest = called
            for flag in re.findall(r"(?<!\S)--\w+", rest):
                assert re.search(rf"{flag}\b", help_of(module, capsys, monkeypatch)), f"{code}: {flag}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_linked_files_exist_and_python_compiles(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        compile(block, str(path), "exec")


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_the_first_pages_stay_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 150
