"""wsdino.launch: processes that agree, threads, kept memory, and signals that a loop hears between its steps."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from wsdino import launch
from wsdino.errors import UserError
from wsdino.launch import (
    Interruption,
    choose_threads,
    keep_freed_memory,
    on_main_process,
    start_processes,
    usable_cores,
)

# One process of two: what each of the works gives or raises on it, as a line of JSON.
RANK = """
import errno, json, os
import torch
from wsdino.errors import UserError
from wsdino.launch import on_main_process, start_processes

class Secretive(Exception):
    def __reduce__(self):
        raise TypeError("cannot be pickled")

class Demanding(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

def throw(error):
    raise error

state = start_processes("try.py")
calls, seen = [], []
for work in (
    lambda: calls.append(1) or {"weights": torch.arange(3).tolist()},
    lambda: throw(UserError("Fix table.csv.")),
    lambda: open("/no/such/file"),
    lambda: throw(Secretive("kept")),
    lambda: throw(Demanding("this", "that")),
    lambda: "after the errors",
):
    try:
        seen.append(["result", on_main_process(state, work)])
    except Exception as error:
        seen.append([type(error).__name__, str(error)])
print(json.dumps([state.process_index, state.num_processes, len(calls), seen]))
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def alone(monkeypatch):
    """The environment of a command that was not launched with others."""
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_two_processes_get_the_main_one_s_result_or_its_error():
    """Also of an exception that cannot be pickled or read back: nobody waits, and the next work is heard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [each[:3] for each in said] == [[0, 2, 1], [1, 2, 0]], "the work is the main process's alone"
    assert said[0][3] == said[1][3]
    result, for_user, path, secretive, demanding, after = said[0][3]
    assert result == ["result", {"weights": [0, 1, 2]}] and after == ["result", "after the errors"]
    assert for_user == ["UserError", "Fix table.csv."]
    assert path[0] == "UserError" and "/no/such/file" in path[1]
    assert secretive[0] == demanding[0] == "RuntimeError"
    assert "Secretive: kept" in secretive[1] and "Demanding: this and that" in demanding[1]


def test_one_process_raises_the_error_itself(alone):
    error = KeyError("defect")
    with pytest.raises(KeyError) as raised:
        on_main_process(start_processes("try.py"), lambda: (_ for _ in ()).throw(error))
    assert raised.value is error
    assert on_main_process(start_processes("try.py"), lambda: 3) == 3


def test_accelerate_that_drops_processes_is_refused(alone):
    """`accelerate launch --cpu --num_processes 2` leaves a group's address, but no size of the group."""
    alone.setenv("ACCELERATE_MIXED_PRECISION", "no")
    alone.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="--multi_gpu --num_processes N .* try.py"):
        start_processes("try.py")


def test_fewer_processes_than_were_launched_are_refused(alone):
    alone.setenv("WORLD_SIZE", "3")
    alone.setenv("ACCELERATE_USE_CPU", "true")
    alone.setattr(launch, "PartialState", lambda **_: type("State", (), {"num_processes": 1}))
    with pytest.raises(UserError, match="3 processes were launched but 1"):
        start_processes("try.py")


def test_usable_cores_heeds_the_limit_of_the_process():
    program = "from wsdino.launch import usable_cores; print(usable_cores())"
    if hasattr(os, "sched_setaffinity"):
        one = {min(os.sched_getaffinity(0))}
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, one),
        )
        assert done.stdout == "1\n"
    assert 1 <= usable_cores() <= os.cpu_count()


@pytest.mark.parametrize(
    "asked, launched, group, expected",
    [(3, True, False, 3), (None, False, False, 1), (None, True, True, 1), (None, True, False, "all")],
    ids=["asked", "python", "one of several", "one of one"],
)
def test_threads(alone, asked, launched, group, expected):
    """`accelerate launch` leaves each process one thread, which a process that works alone need not accept."""
    if launched:
        alone.setenv("ACCELERATE_MIXED_PRECISION", "no")
    if group:
        alone.setenv("WORLD_SIZE", "2")
    alone.setattr(launch, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        choose_threads(asked)
        # A process that has a GPU leaves torch's choice.
        all_cores = 2 if launch.PartialState().device.type == "cpu" else 1
        assert torch.get_num_threads() == (all_cores if expected == "all" else expected)
    finally:
        torch.set_num_threads(before)


def test_freed_memory_is_kept():
    """256 MiB that were freed stay with the process."""
    program = (
        "import os, sys, torch\nfrom wsdino.launch import keep_freed_memory\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "if sys.argv[1] == 'keep': keep_freed_memory()\n"
        "before = resident()\nblock = torch.ones(2**26)\ndel block\nprint(resident() - before)"
    )
    if sys.platform != "linux":
        keep_freed_memory()  # does nothing, and says nothing
        pytest.skip("glibc is Linux's")
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", program, word], capture_output=True, text=True).stdout)
        for word in ("keep", "return")
    )
    assert kept > 200 * 2**20 > 50 * 2**20 > returned


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_noted_and_the_handlers_come_back(kind):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert interruption.signal is None
        os.kill(os.getpid(), kind)
        assert interruption.signal == kind
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("kinds", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_ends_the_process_at_once(kinds):
    program = (
        "import time\nfrom wsdino.launch import Interruption\n"
        "with Interruption() as interruption:\n"
        " print('ready', flush=True)\n"
        " while interruption.signal is None: time.sleep(0.01)\n"
        " print('noted', flush=True)\n"
        " while True: time.sleep(0.01)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(kinds[0])
        assert process.stdout.readline() == "noted\n" and process.poll() is None
        process.send_signal(kinds[1])
        assert process.wait(timeout=10) == -kinds[1]
    finally:
        process.kill()
        process.communicate()
