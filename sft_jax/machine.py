"""What this process asks of, and knows about, the machine: environment, caches, memory, age. Imports nothing heavy."""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import resource
import stat
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

from sft_jax.errors import ConfigError

_IMPORTED = time.time()
RELAUNCHED = "SFT_RELAUNCHED"
# Set before anything heavy is imported: no advice about frameworks that are rightly missing, no import of torch where
# it happens to be installed, no fork warnings from tokenizers, no addresses in the log of the hub's client (they may
# hold a password; what it raises is quoted without).
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "USE_TORCH": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "GRPC_VERBOSITY": "ERROR",
}
# Large pages where the program asks for much memory: fresh buffers of a training step on a CPU cost a third of its
# time in page faults without. Read by glibc as the process starts, hence the relaunch.
HUGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# Where libraries keep what can be made again, by their own names; below the user's home if nothing is said.
CACHES = ("HF_HOME", "MPLCONFIGDIR")
# jax's own names: where compiled programs are kept, which are worth it, and whether any are.
PROGRAMS, WORTH, KEEP = (
    "JAX_COMPILATION_CACHE_DIR",
    ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5"),
    "JAX_ENABLE_COMPILATION_CACHE",
)


class Flag(NamedTuple):
    """A setting of XLA, and the jaxlibs that take it: one that they do not know would end the process."""

    platform: str  # as `JAX_PLATFORMS` names it
    name: str
    value: str
    since: tuple[int, int]


NEXT = (0, 13)  # the first jaxlib whose flags nobody has looked at; it gets none
FLAGS = (
    # Moves collectives so that they overlap with arithmetic, as NVIDIA's own images of jax have it; XLA has it off.
    Flag("cuda", "xla_gpu_enable_latency_hiding_scheduler", "true", (0, 10)),
    # Not here, since XLA's own choice is it already: Triton's matrix products beside cuBLAS (xla_gpu_triton_gemm_any),
    # the faster of which autotuning finds (xla_gpu_autotune_level=4); what it finds is kept with the programs.
    # Collectives that are combined or pipelined are worth a try from several hosts on, not before.
)
# Asked for by a training step alone, in bfloat16. Products whose operands are transposed, as all of a backward pass
# are, miss the fast path without it: the gradient of ViT-base took nine times as long on a Xeon with AMX. jaxlib 0.12
# cannot keep such a program (it runs out of memory as it writes it), so that every run compiles it; in float32 steps
# were 3 % faster on an EPYC, which is less than that, and no faster on the Xeon. Nothing is gained before 0.12.
FAST_BFLOAT16 = Flag("cpu", "xla_cpu_experimental_onednn_custom_call", "true", (0, 12))
NOT_KEPT = "Error writing persistent compilation cache entry for .*: MemoryError"  # what jax says then
# No atomic sums and no kernel that is picked by its time, forward or backward, cuDNN's attention included.
DETERMINISTIC = Flag("cuda", "xla_gpu_deterministic_ops", "true", (0, 10))
PLUGINS = {"cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin")}
# jax asks for this share of a GPU's memory at once, and no more; it would be 0.75. The rest is for cuDNN and NCCL.
MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")


def flags(platform: str, version: tuple[int, int], *, deterministic: bool = False) -> dict[str, str]:
    """The settings of XLA that a jaxlib of this version takes for a platform."""
    wanted = (*FLAGS, DETERMINISTIC) if deterministic else FLAGS
    return {f.name: f.value for f in wanted if f.platform == platform and f.since <= version < NEXT}


def step_options(platform: str, dtype: str) -> dict[str, bool]:
    """What a training step is compiled with besides, where the user does not say otherwise.

    Where such a step cannot be kept, jax is not heard to say so in every run.
    """
    flag = FAST_BFLOAT16
    wanted = platform == flag.platform and dtype == "bfloat16" and flag.since <= _jaxlib() < NEXT
    if not wanted or flag.name in _named(os.environ.get("XLA_FLAGS", "")):
        return {}
    warnings.filterwarnings("ignore", NOT_KEPT)
    return {flag.name: True}


def _jaxlib() -> tuple[int, int]:
    major, minor = importlib.metadata.version("jaxlib").split(".")[:2]
    return int(major), int(minor)


def _named(flags: str) -> set[str]:
    return {word.lstrip("-").partition("=")[0] for word in flags.split()}


def tune(*, deterministic: bool = False) -> None:
    """Tell XLA what is fast here, by `XLA_FLAGS`, where the user does not say otherwise; precedes the import of jax."""
    given = os.environ.get("XLA_FLAGS", "")
    if given and not given.lstrip().startswith("-"):  # the name of a file that holds them
        return
    version, named = _jaxlib(), _named(given)
    allowed = os.environ.get("JAX_PLATFORMS", "").replace("gpu", "cuda")
    for found, plugins in PLUGINS.items():
        if found not in (allowed or found).split(",") or not any(map(importlib.util.find_spec, plugins)):
            continue
        wanted = flags(found, version, deterministic=deterministic)
        given = " ".join([given, *(f"--{name}={value}" for name, value in wanted.items() if name not in named)])
        if found == "cuda":
            os.environ.setdefault(*MEMORY)
    if given.strip():
        os.environ["XLA_FLAGS"] = given.strip()


def is_deterministic() -> bool:
    """Whether XLA was told to compute the same bits each time, where it would not by itself."""
    words = [word.lstrip("-").partition("=") for word in os.environ.get("XLA_FLAGS", "").split()]
    said = [value.lower() for name, _, value in words if name == DETERMINISTIC.name]
    return bool(said) and said[-1] in ("", "true", "1")


def quiet() -> None:
    """Put the environment of this process in order; keeping the user's settings; others may not write our files."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.umask(os.umask(0o022) | 0o022)
    if not has_home() and "XDG_CACHE_HOME" not in os.environ:
        with contextlib.suppress(OSError):  # libraries would make a directory called ~ where the command is given
            for name in CACHES:
                os.environ.setdefault(name, str(cache_home() / name.lower()))


def speak_utf8() -> None:
    """Read and write UTF-8 on the standard streams, whatever the locale: records are, as files are.

    A byte of the input that is not UTF-8 is an error when it is read; what cannot be written is written as its code.
    """
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # not what tests and notebooks put in its place, nor none at all
            stream.reconfigure(encoding="utf-8", errors=errors)


def has_home() -> bool:
    """Whether `~` stands for a directory; not so without HOME, of a user id that no list of users has."""
    return os.path.expanduser("~") != "~"


def cache_home() -> Path:
    """Where is kept what can be made again: `$SFT_JAX_CACHE`, else `sft_jax` in the user's cache directory.

    Of a user without a home, as in a container, it is a private directory beside other temporary files.
    """
    base = os.environ.get("SFT_JAX_CACHE")
    if base:
        return Path(base).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if base or has_home():
        return Path(base or "~/.cache").expanduser() / "sft_jax"
    home = Path(tempfile.gettempdir()) / f"sft_jax-{os.geteuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    found = home.lstat()  # whoever made it first might be somebody else, and what is read there is trusted
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(f"{home}: is not a directory of yours alone; set SFT_JAX_CACHE to one that is")
    return home


def keep_programs() -> None:
    """Have jax keep what it compiles, in a private directory or in the one that the user named; precedes its import.

    What is found there is run, so that a directory which others may write to is refused. Where none can be made,
    nothing is kept.
    """
    named = os.environ.get(PROGRAMS)
    if os.environ.get(KEEP, "").lower() in ("0", "false", "f", "no", "n", "off") or "://" in (named or ""):
        return
    try:
        home = Path(named) if named else cache_home() / "programs"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    status = home.stat()
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{home}: belongs to another user, and compiled programs in it are run; set {PROGRAMS} to yours"
        )
    if status.st_mode & 0o022:
        raise ConfigError(f"{home}: others may write to it, and compiled programs in it are run; chmod 700 {home}")
    os.environ[PROGRAMS] = str(home)
    os.environ.setdefault(*WORTH)


def relaunch_with_huge_pages() -> None:
    """Start this very command again with large pages, once, on Linux with glibc; else return."""
    name, value = HUGE_PAGES
    if platform.libc_ver()[0] != "glibc" or RELAUNCHED in os.environ or name in os.environ:
        return
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, {**os.environ, name: value, RELAUNCHED: "1"})


def started() -> float:
    """When this process began, as `time.time()`; a relaunch does not make it younger."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            boot = time.time() - float(uptime.read().split()[0])
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return _IMPORTED


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
