"""wsdino.errors: what a command says of an error, and the status that it ends with."""

import configparser
import errno
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import wsdino
from wsdino.__main__ import COMMANDS, main
from wsdino.errors import UserError, command, first_line, sentence_for_user


def ended(work, capsys):
    """(exit status, standard error) of a command whose work is `work`."""
    with pytest.raises(SystemExit) as end:
        command("wsdino-try")(lambda argv=None: work())([])
    return end.value.code, capsys.readouterr().err


def throw(error):
    raise error


def test_a_user_error_is_one_line_and_status_2(capsys):
    assert ended(lambda: throw(UserError("Fix table.csv.")), capsys) == (2, "wsdino-try: error: Fix table.csv.\n")


def test_a_path_that_cannot_be_used_is_named(tmp_path, capsys):
    status, said = ended(lambda: open(tmp_path / "absent"), capsys)
    assert status == 2 and str(tmp_path / "absent") in said and os.strerror(errno.ENOENT) in said


def test_a_full_disk_names_no_file_but_is_a_sentence(capsys):
    status, said = ended(lambda: throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), capsys)
    assert status == 2 and "None" not in said and os.strerror(errno.ENOSPC) in said


def test_ctrl_c_is_status_130(capsys):
    assert ended(lambda: throw(KeyboardInterrupt()), capsys) == (130, "")


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), ConnectionResetError(errno.ECONNRESET, "reset"), OSError("?")]
)
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised:
        command("wsdino-try")(lambda argv=None: throw(error))([])
    assert raised.value is error and sentence_for_user(error) is None


def test_a_command_returns_its_result_and_passes_its_flags():
    assert command("wsdino-try")(lambda argv=None: argv)(["--flag"]) == ["--flag"]


def test_an_exit_of_the_parser_is_left_alone():
    with pytest.raises(SystemExit) as end:
        command("wsdino-try")(lambda argv=None: sys.exit(0))([])
    assert end.value.code == 0


@pytest.mark.parametrize(
    "error, line", [(ValueError("one\ntwo"), "one"), (KeyError(), "KeyError"), (OSError(" \n"), "OSError")]
)
def test_first_line(error, line):
    assert first_line(error) == line


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, row):
        raise UserError("image.tif cannot be read: copy it again.")


def test_the_error_of_a_loader_worker_is_the_sentence_alone():
    with pytest.raises(UserError) as raised:
        list(DataLoader(Broken(), num_workers=1))
    assert "Traceback" in str(raised.value)  # what torch makes of it
    assert sentence_for_user(raised.value) == "image.tif cannot be read: copy it again."


def test_the_package_names_its_version():
    try:
        assert wsdino.__version__ == version("wsdino")
    except PackageNotFoundError:
        assert wsdino.__version__.startswith("0")


@pytest.mark.parametrize("words, status", [([], 2), (["trian"], 2), (["--help"], 0)])
def test_python_m_wsdino_lists_its_commands(words, status):
    done = subprocess.run([sys.executable, "-m", "wsdino", *words], capture_output=True, text=True)
    assert done.returncode == status and all(name in done.stdout + done.stderr for name in COMMANDS)


def test_python_m_wsdino_has_every_console_script():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    scripts = dict(line.split(" = ") for line in setup["options.entry_points"]["console_scripts"].strip().splitlines())
    assert scripts == {f"wsdino-{name}": f"{module}:main" for name, module in COMMANDS.items()}


def test_python_m_wsdino_passes_flags_and_status(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "absent")])
    assert end.value.code == 2 and str(tmp_path / "absent") in capsys.readouterr().err.splitlines()[-1]
