"""wsdino.files: a reader sees the former file or the new one, and other people's folders are left alone."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from wsdino.errors import UserError
from wsdino.files import claim_folder, digest, locked, read_json, remove, write_json, write_text, written_whole

KILLED = """
import os, sys, time
from pathlib import Path
from wsdino.files import written_whole
path, kind, moment = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if moment == "between renames":
    Path.rename = lambda self, target, rename=Path.rename: (
        os.kill(os.getpid(), 9) if self.name.endswith(".partial") else rename(self, target))
with written_whole(path) as partial:
    if kind == "folder":
        partial.mkdir()
        (partial / "one").write_text("new")
    else:
        partial.write_text("new")
    if moment == "while writing":
        os.kill(os.getpid(), 9)
"""


def content(path):
    """What a file holds, or the one file of a folder."""
    return (path / "one" if path.is_dir() else path).read_text()


def stand(path, kind):
    """Put a former file or folder in place."""
    if kind == "folder":
        path.mkdir()
        (path / "one").write_text("old")
    else:
        path.write_text("old")


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("former", [False, True])
def test_a_kill_while_writing_leaves_what_was_there(tmp_path, kind, former):
    path = tmp_path / "result"
    if former:
        stand(path, kind)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind, "while writing"])
    assert done.returncode == -signal.SIGKILL
    assert content(path) == "old" if former else not path.exists()
    with written_whole(path) as partial:
        assert not partial.exists(), "the killed writer's half is removed"
        stand(partial, kind)
    assert os.listdir(tmp_path) == ["result"] and content(path) == "old"


def test_a_kill_between_the_renames_of_a_folder_loses_neither(tmp_path):
    path = tmp_path / "model"
    stand(path, "folder")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), "folder", "between renames"])
    assert done.returncode == -signal.SIGKILL and not path.exists()
    with pytest.raises(KeyboardInterrupt), written_whole(path):
        raise KeyboardInterrupt  # the next writer fails too: the former folder is back nevertheless
    assert os.listdir(tmp_path) == ["model"] and content(path) == "old"


def test_readers_see_whole_files_while_others_write(tmp_path):
    """A reader that never stops meets one of the two contents each time."""
    path = tmp_path / "settings.json"
    write_json(path, {"value": "a" * 100_000})
    program = (
        "import sys\nfrom wsdino.files import write_json\n"
        "while True:\n for letter in 'ab': write_json(sys.argv[1], {'value': letter * 100_000})"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
    try:
        seen, end = set(), time.monotonic() + 3
        while (len(seen) < 2 and time.monotonic() < end + 20) or time.monotonic() < end:
            text = json.loads(path.read_text())["value"]
            assert text in ("a" * 100_000, "b" * 100_000)
            seen.add(text[0])
    finally:
        writer.kill()
        writer.wait()
    assert seen == {"a", "b"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_while_writing_keeps_what_was_there(tmp_path, kind):
    path = tmp_path / "result"
    stand(path, kind)
    with pytest.raises(ZeroDivisionError), written_whole(path) as partial:
        stand(partial, kind)
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ["result"] and content(path) == "old"


def test_parents_are_made_and_a_file_may_replace_a_folder(tmp_path):
    write_text(tmp_path / "a" / "b" / "text", "µm")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "µm".encode()
    write_json(tmp_path / "a" / "b", {"one": [1]})
    assert json.loads((tmp_path / "a" / "b").read_text()) == {"one": [1]}


def test_remove(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("link", "absent"):
        remove(tmp_path / name)
    assert (tmp_path / "kept" / "file").exists() and not (tmp_path / "link").is_symlink()
    remove(tmp_path / "kept")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["{half", "[]", "3", "null", "", "{}", b"\xff\xfe", None, "a folder"])
def test_a_json_file_that_cannot_be_used_names_itself_and_the_fix(tmp_path, damage):
    path = tmp_path / "settings.json"
    if damage == "a folder":
        path.mkdir()
    elif damage is not None:
        path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.raises(UserError) as raised:
        read_json(path, needs=["arguments"], fix="train again")
    assert str(path) in str(raised.value) and "train again" in str(raised.value) and "\n" not in str(raised.value)


def test_a_json_file_is_read(tmp_path):
    write_json(tmp_path / "one.json", {"name": "β", "more": 1})
    assert read_json(tmp_path / "one.json", needs=["name"], fix="") == {"name": "β", "more": 1}


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1])
def test_digest_is_sha256(tmp_path, size):
    (tmp_path / "file").write_bytes(bytes(size))
    assert digest(tmp_path / "file") == hashlib.sha256(bytes(size)).hexdigest()


def test_claim_folder_tells_new_ours_and_strange(tmp_path):
    def claim(name):
        return claim_folder(tmp_path / name, "build.json", "dataset of this project", ignore=[".lock"])

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").touch()
    assert claim("absent") is False and claim("empty") is False and not (tmp_path / "absent").exists()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "build.json").touch()
    assert claim("ours") is True
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name in ("strange", "file"):
        with pytest.raises(UserError, match=name):
            claim(name)


def test_a_lock_is_held_by_one_process_and_given_back_by_a_dead_one(tmp_path):
    path = tmp_path / "run" / ".lock"
    program = (
        "import sys, time\nfrom wsdino.files import locked\n"
        "with locked(sys.argv[1], 'taken'):\n print('held', flush=True)\n time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="^Another training runs.$"), locked(path, "Another training runs."):
        pytest.fail("two processes hold one lock")
    other.kill()
    other.communicate()
    with locked(path, "Another training runs."):
        pass
    with pytest.raises(ZeroDivisionError), locked(path, ""):
        1 / 0  # noqa: B018
    with locked(path, "an error gives the lock back"):
        pass
