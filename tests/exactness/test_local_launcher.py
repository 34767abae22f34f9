"""`launch/local.sh` starts, prefixes, hands on signals and cleans up."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.sh"
SPEAK = "import os; print(*(os.environ[f'SFT_{n}'] for n in ('COORDINATOR', 'NUM_PROCESSES', 'PROCESS_ID')))"


def launch(count: str, *command: str) -> subprocess.Popen[str]:
    """The launcher with this command."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([LAUNCHER, count, *command], text=True, **streams)  # type: ignore[call-overload]


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_each_process_is_told_who_it_is():
    """R47: every line is prefixed with the process's number, and all have the same coordinator on the loopback."""
    started = launch("3", "python3", "-c", SPEAK)
    lines = sorted(started.communicate(timeout=60)[0].splitlines())
    assert started.returncode == 0
    address = lines[0].split()[1]
    assert address.startswith("127.0.0.1:")
    assert lines == [f"[{n}] {address} 3 {n}" for n in range(3)]


def test_one_failure_ends_all_and_its_code_is_returned():
    """R47, R26: when one fails the others are ended with their children, even one that shrugs at SIGTERM."""
    wait = "trap '' TERM; echo $$; sleep 60 & echo $!; wait; sleep 60"
    script = f"if [ $SFT_PROCESS_ID = 1 ]; then sleep 1; exit 65; fi; {wait}"
    begin = time.monotonic()
    started = launch("2", "bash", "-c", script)
    lines = started.communicate(timeout=60)[0].splitlines()
    assert started.returncode == 65 and time.monotonic() - begin < 30
    pids = [int(line.split()[1]) for line in lines if line.startswith("[0] ") and line.split()[1].isdigit()]
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(("number", "polite", "rude"), [(signal.SIGTERM, 42, 143), (signal.SIGINT, 42, 130)])
def test_signals_are_handed_on(number: signal.Signals, polite: int, rude: int):
    """R47, R5: a process may answer a signal with an exit code of its own, which is returned; else the signal's is."""
    answer = "trap 'echo bye; exit 42' TERM INT; echo ready; for i in $(seq 100); do sleep 0.1; done"
    for script, code in ((answer, polite), ("echo ready; exec sleep 60", rude)):
        started = launch("2", "bash", "-c", script)
        assert started.stdout is not None
        ready = [started.stdout.readline() for _ in range(2)]
        assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
        started.send_signal(number)
        said = started.communicate(timeout=60)[0]
        assert started.returncode == code
        assert (said.count("bye") == 2) == (script is answer)


@pytest.mark.parametrize("words", [(), ("2",), ("0", "true"), ("two", "true")])
def test_a_wrong_call_says_how(words: tuple[str, ...]):
    """R47: without a number and a command the usage is shown, with exit code 2."""
    done = subprocess.run([LAUNCHER, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "usage: launch/local.sh PROCESSES COMMAND" in done.stderr
