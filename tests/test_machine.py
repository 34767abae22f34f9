"""What is asked of the machine: a private cache of compiled programs that may break, and files that are ours alone."""

import os
import pwd
import re
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest

from sft_jax import checks, machine
from sft_jax import mesh as meshes
from sft_jax.config.schema import RunSection
from sft_jax.errors import ConfigError, ProcessError
from sft_jax.run import prepare, train_program
from sft_jax.train.checkpoint import Checkpoints
from sft_jax.train.profile import programs
from sft_jax.train.state import abstract_frozen, abstract_state

TWO = {"SFT_COORDINATOR": "127.0.0.1:1234", "SFT_NUM_PROCESSES": "2", "SFT_PROCESS_ID": "1"}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Where programs are kept when the user says nothing, in a process that lets everybody write."""
    monkeypatch.setenv("SFT_JAX_CACHE", str(tmp_path / "cache"))
    for name in (machine.PROGRAMS, machine.WORTH[0], machine.KEEP):
        monkeypatch.delenv(name, raising=False)
    before = os.umask(0)
    yield tmp_path / "cache" / "programs"
    os.umask(before)


def mode(path: Path) -> int:
    """Who may do what."""
    return stat.S_IMODE(path.stat().st_mode)


def test_programs_are_kept_in_private(home):
    """R38: compiled programs are kept by default, in a directory of the user's cache that nobody else can look into."""
    machine.keep_programs()
    assert os.environ[machine.PROGRAMS] == str(home) and mode(home) == 0o700
    assert os.environ[machine.WORTH[0]] == "0.5"
    machine.keep_programs()  # as it is found the next time


def test_the_users_directory_wins(home, tmp_path, monkeypatch):
    """R38: a directory that the user named is taken, made private where it is not there, and checked likewise."""
    monkeypatch.setenv(machine.PROGRAMS, str(tmp_path / "mine"))
    machine.keep_programs()
    assert os.environ[machine.PROGRAMS] == str(tmp_path / "mine") and mode(tmp_path / "mine") == 0o700
    (tmp_path / "mine").chmod(0o755)
    machine.keep_programs()
    (tmp_path / "mine").chmod(0o777)
    with pytest.raises(ConfigError, match=f"others may write to it, .*; chmod 700 {tmp_path / 'mine'}"):
        machine.keep_programs()
    assert not home.exists()
    monkeypatch.setenv(machine.PROGRAMS, "gs://bucket/programs")
    machine.keep_programs()


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o702, 0o1777])
def test_a_directory_that_others_write_to_is_refused(home, bits):
    """R38: who can write a compiled program can have it run: such a directory is refused, with what to do."""
    home.mkdir(parents=True)
    home.chmod(bits)
    with pytest.raises(ConfigError, match=f"others may write to it, .* are run; chmod 700 {home}"):
        machine.keep_programs()
    assert machine.PROGRAMS not in os.environ


def test_a_directory_of_another_user_is_refused(home, monkeypatch):
    """R38: the same holds for a directory that belongs to somebody else."""
    home.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: home.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        machine.keep_programs()


def test_nothing_is_kept(home, tmp_path, monkeypatch):
    """R38: jax's own switch turns the cache off, and where no directory can be made there is none."""
    monkeypatch.setenv(machine.KEEP, "false")
    machine.keep_programs()
    assert not home.exists() and machine.PROGRAMS not in os.environ
    monkeypatch.delenv(machine.KEEP)
    (tmp_path / "file").touch()
    monkeypatch.setenv("SFT_JAX_CACHE", str(tmp_path / "file"))
    machine.keep_programs()
    assert machine.PROGRAMS not in os.environ


def test_a_command_is_refused_before_it_begins(tmp_path):
    """R38: a command that would compile ends with one line and code 2, before jax is imported."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    environment = {**os.environ, machine.PROGRAMS: str(tmp_path / "open"), machine.RELAUNCHED: "1"}
    command = [sys.executable, "-X", "importtime", "-m", "sft_jax", "predict", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert lines == [f"{tmp_path / 'open'}: others may write to it, and compiled programs in it are run; "
                     f"chmod 700 {tmp_path / 'open'}"]  # fmt: skip
    assert "jax._src" not in done.stderr


PROGRAM = """
from sft_jax import machine
machine.quiet()
machine.keep_programs()
import jax
found = []
jax.monitoring.register_event_listener(lambda event, **more: found.append(event))
value = jax.jit(lambda x: (jax.numpy.sin(x) @ x.T).sum())(jax.numpy.arange(12.0).reshape(3, 4))
print(float(value), "/jax/compilation_cache/cache_hits" in found)
"""


def test_broken_entries_are_compiled_again(home):
    """R38: a kept program is used; one with flipped or missing bytes is compiled again, with the same result."""
    environment = {**os.environ, machine.WORTH[0]: "0", machine.PROGRAMS: str(home)}

    def run() -> tuple[list[str], str]:
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(), done.stderr

    (cold, hit), _ = run()
    assert hit == "False"
    assert run() == ([cold, "True"], "")
    entries = sorted(home.glob("*-cache"))
    assert entries
    for change in (lambda old: bytes(b ^ 0x55 for b in old), lambda old: old[: len(old) // 2], flip_in_the_middle):
        kept = [entry.read_bytes() for entry in entries]
        for entry, old in zip(entries, kept, strict=True):
            entry.write_bytes(change(old))
        (again, hit), said = run()
        assert (again, hit) == (cold, "False") and "Error reading persistent compilation cache entry" in said
        for entry, old in zip(entries, kept, strict=True):
            entry.write_bytes(old)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_is_found_again(configure, dtype):
    """R38 D6: what a run has compiled its step to is kept, and found by the next, with other seeds too; steps with a
    setting of their own compile, but need not be kept."""
    found, shapes = [], set()
    for seed in range(3):
        run = prepare(configure("model.dropout=0.1", f"seed={seed}", f"train.compute_dtype={dtype}"))
        shapes.add(run.batches.shapes)
        state = abstract_state(run.model.template, run.frozen, run.begin)
        program = train_program(run, state, abstract_frozen(run.model.template, run.frozen, run.dtype))
        before = programs()["found"]
        program.compile(run.batches[0])
        found.append(programs()["found"] - before)
    assert len(shapes) == 1
    assert found[1:] == [1, 1] or machine.step_options("cpu", dtype)


def flip_in_the_middle(old: bytes) -> bytes:
    """One bit of it, changed."""
    middle = len(old) // 2
    return old[:middle] + bytes([old[middle] ^ 1]) + old[middle + 1 :]


def test_files_are_not_open_to_others():
    """R38: whatever a process of ours writes, others may not write to; a stricter setting of the user stays."""
    before = os.umask(0)
    try:
        for given, wanted in ((0, 0o022), (0o077, 0o077), (0o002, 0o022)):
            os.umask(given)
            machine.quiet()
            assert os.umask(0) == wanted
    finally:
        os.umask(before)


SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler"
SAME = f"--{machine.DETERMINISTIC.name}"


@pytest.fixture
def tuned(monkeypatch):
    """`tuned(flags, platforms, version, plugins)`: what becomes of XLA_FLAGS on such a machine, word by word."""

    def of(given=None, platforms="", version="0.12.0.1", plugins=("jaxlib",), **how) -> list[str]:
        for name, value in {"XLA_FLAGS": given, "JAX_PLATFORMS": platforms, machine.MEMORY[0]: None}.items():
            monkeypatch.setenv(name, value or "")  # so that it is put back, whatever it was
            if value is None:
                monkeypatch.delenv(name)
        monkeypatch.setattr(machine.importlib.metadata, "version", lambda package: version)
        monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name if name in plugins else None)
        machine.tune(**how)
        machine.tune(**how)  # twice is once
        return os.environ.get("XLA_FLAGS", "").split()

    return of


def test_each_platform_gets_its_flags(tuned):
    """R38: the flags of what is installed and allowed, and of no other platform; none where jaxlib has not got them."""
    cuda = ("jaxlib", "jax_cuda13_plugin")
    assert tuned() == tuned(version="0.13.0", plugins=cuda) == tuned(platforms="tpu", plugins=cuda) == []
    assert machine.MEMORY[0] not in os.environ
    assert tuned(plugins=cuda) == tuned(plugins=cuda, platforms="gpu", version="0.11.2") == [f"{SCHEDULER}=true"]
    assert os.environ[machine.MEMORY[0]] == machine.MEMORY[1]
    assert tuned(plugins=cuda, platforms="cpu", deterministic=True) == []


def test_a_step_in_bfloat16_has_a_setting_of_its_own(tuned):
    """R38: steps alone, on a CPU, in bfloat16, of a jaxlib that has it; the user's word for it wins."""
    for version, dtype, platform, wanted in (
        ("0.12.0.1", "bfloat16", "cpu", True),
        ("0.12.0.1", "float32", "cpu", False),
        ("0.12.0.1", "bfloat16", "gpu", False),
        ("0.11.2", "bfloat16", "cpu", False),
        ("0.13.0", "bfloat16", "cpu", False),
    ):
        tuned(version=version)
        found = machine.step_options(platform, dtype)
        assert found == ({machine.FAST_BFLOAT16.name: True} if wanted else {})
    tuned(f"--{machine.FAST_BFLOAT16.name}=false")
    assert machine.step_options("cpu", "bfloat16") == {}


def test_the_users_flags_win(tuned, tmp_path):
    """R38: what the user says stays as it is, and a file of flags is left to the user altogether."""
    gpu = ("jaxlib", "jax_cuda13_plugin")
    assert tuned(f"--xla_a=1 {SCHEDULER}=false", plugins=gpu) == ["--xla_a=1", f"{SCHEDULER}=false"]
    assert tuned("--xla_a=1", plugins=gpu) == ["--xla_a=1", f"{SCHEDULER}=true"]
    assert tuned(str(tmp_path / "flags")) == [str(tmp_path / "flags")]


def test_the_same_bits_must_have_been_asked_for(tuned):
    """R38: `run.deterministic` reaches the compiler of a GPU, or preparing fails and names the flag."""
    wanted, gpu = RunSection(deterministic=True), ("jaxlib", "jax_cuda12_plugin")
    assert f"{SAME}=true" in tuned(plugins=gpu, deterministic=True) and machine.is_deterministic()
    checks.determinism(wanted, "gpu")
    for flags in (None, f"{SAME}=false", f"{SAME}=true {SAME}=false"):
        tuned(flags, deterministic=False, plugins=gpu)
        with pytest.raises(ConfigError, match=f"run.deterministic: XLA_FLAGS lacks {SAME}=true; set it before"):
            checks.determinism(wanted, "gpu")
        checks.determinism(wanted, "cpu")
        checks.determinism(RunSection(), "gpu")


@pytest.mark.parametrize("nonsense", [False, True], ids=["ours", "control"])
def test_jaxlib_knows_its_flags(nonsense):
    """R38: the jaxlib that is installed takes every flag that it would get; one that it does not know ends it."""
    version = tuple(map(int, machine.importlib.metadata.version("jaxlib").split(".")[:2]))
    wanted = {
        name: value
        for found in machine.PLUGINS
        for name, value in machine.flags(found, version, deterministic=True).items()
    }
    assert wanted
    words = [f"--{name}={value}" for name, value in wanted.items()] + ["--xla_nonsense=1"] * nonsense
    program = "import jax; print(jax.numpy.arange(3).sum())"
    environment = {**os.environ, "XLA_FLAGS": " ".join(words), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0 and done.stdout == "3\n") == (not nonsense), done.stderr


@pytest.fixture
def homeless(tmp_path, monkeypatch) -> Path:
    """A user id that no list of users has, without HOME, and where its temporary files are."""

    def unknown(number: int):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "SFT_JAX_CACHE", machine.PROGRAMS, *machine.WORTH[:1], *machine.CACHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_a_home_has_a_cache(homeless, monkeypatch):
    """M: what can be made again is kept in a private directory among temporary files, and so do libraries."""
    assert not machine.has_home()
    home = machine.cache_home()
    assert home.parent == homeless and mode(home) == 0o700
    monkeypatch.setattr(os, "environ", dict(os.environ))
    machine.quiet()
    assert [Path(os.environ[name]).parent for name in machine.CACHES] == [home] * len(machine.CACHES)
    machine.keep_programs()
    assert os.environ[machine.PROGRAMS] == str(home / "programs")
    home.chmod(0o777)
    with pytest.raises(ConfigError, match=r"is not a directory of yours alone; set SFT_JAX_CACHE"):
        machine.cache_home()


def test_a_link_is_no_private_directory(homeless, tmp_path_factory):
    """M: whoever was there first may not send us elsewhere."""
    (homeless / f"sft_jax-{os.geteuid()}").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(ConfigError, match="is not a directory of yours alone"):
        machine.cache_home()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"SFT_COORDINATOR": "a:1"},
            "SFT_COORDINATOR alone; set SFT_COORDINATOR, SFT_NUM_PROCESSES and SFT_PROCESS_ID",
        ),
        ({"SFT_PROCESS_ID": "1", "SFT_NUM_PROCESSES": "2"}, "SFT_NUM_PROCESSES and SFT_PROCESS_ID alone"),
        ({**TWO, "SFT_PROCESS_ID": "2"}, "SFT_PROCESS_ID=2 of SFT_NUM_PROCESSES=2; they are counted from 0 to 1"),
        ({**TWO, "SFT_PROCESS_ID": "-1"}, "SFT_PROCESS_ID=-1; expected a whole number from 0"),
        ({**TWO, "SFT_NUM_PROCESSES": "two"}, "SFT_NUM_PROCESSES=two; expected a whole number from 1"),
        ({**TWO, "SFT_COORDINATOR": "host"}, "SFT_COORDINATOR=host; expected host:port"),
        ({**TWO, "SFT_COORDINATOR": "host:70000"}, "SFT_COORDINATOR=host:70000; expected host:port"),
        ({**TWO, "SFT_WAIT": "soon"}, "SFT_WAIT=soon; expected a whole number from 1 to 3000"),
    ],
)
def test_what_a_launcher_says_wrongly_is_one_line(given, said, monkeypatch):
    """A process of several that is told half, or what cannot be, says what is wrong."""
    for name in (meshes.COORDINATOR, meshes.PROCESSES, meshes.PROCESS, meshes.WAIT):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^environment: {re.escape(said)}"):
        meshes.start_processes()


def test_a_coordinator_that_is_not_there(monkeypatch):
    """Nobody answers: the address, why, and what to do, after the seconds that were given; a port that is taken too."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for name, value in {**TWO, "SFT_COORDINATOR": address, "SFT_PROCESS_ID": "0"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"={address}; process 0 cannot listen there .*; give another port"):
            meshes.start_processes()
    monkeypatch.setenv("SFT_PROCESS_ID", "1")
    monkeypatch.setenv("SFT_WAIT", "1")
    with pytest.raises(
        ProcessError, match=f"={address}; process 0 cannot be reached there .Connection refused.; start"
    ):
        meshes.start_processes()


def test_processes_that_do_not_come():
    """The first of two that waits in vain ends with one line and code 69, not with a trace of C++."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = (
        "import sys; from sft_jax import __main__, mesh; sys.app = mesh.start_processes; "
        "sys.modules['sft_jax.cli'] = sys; __main__.main()"
    )
    environment = {**os.environ, **TWO, "SFT_COORDINATOR": address, "SFT_PROCESS_ID": "0", "SFT_WAIT": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 69 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"SFT_NUM_PROCESSES=2, but not all of them came to SFT_COORDINATOR={address} in time" in done.stderr


def test_another_process_that_died(monkeypatch, tmp_path):
    """What jax says when another process is gone is told apart from what a full disk says, however deep it stands."""
    try:
        raise ValueError("save") from RuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    except ValueError as error:
        gone = error
    assert meshes.lost_peer(gone) is None, "alone, nobody can be gone"
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert str(meshes.lost_peer(gone)).startswith("UNKNOWN: Gloo")
    assert meshes.lost_peer(OSError(28, "No space left on device")) is None

    def fail(manager):
        raise gone

    with pytest.raises(ValueError, match="save"):  # not "make room for it"
        Checkpoints(tmp_path, 2)._try(fail)


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_words_of_any_language_are_printed_under_any_locale(tmp_path, locale):
    """S: what is printed is UTF-8, as files are; a home that does not exist is a line."""
    file = tmp_path / "base.yaml"
    file.write_text(
        "model: {source: x/y}\ntask: {kind: sequence_classification, labels: [плохо, 好]}\n", encoding="utf-8"
    )
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}, **locale}
    command = [sys.executable, "-m", "sft_jax", "config", "show", str(file), "eval.every=never"]
    root = Path(checks.__file__).parents[1]
    data = "data.source={kind: files, train: ~nobody-of-this-name/train.csv}"
    done = subprocess.run([*command, data], env=environment, capture_output=True, cwd=root)
    assert (
        done.returncode == 2
        and done.stderr.decode() == "~: no directory is known for it; set HOME, or write whole paths\n"
    )
    data = f"data.source={{kind: files, train: {file}}}"
    done = subprocess.run([*command, data], env=environment, capture_output=True, cwd=root)
    assert done.returncode == 0 and "плохо" in done.stdout.decode() and "好" in done.stdout.decode(), done.stderr
