"""What this process asks of, and knows about, the machine: environment, memory, age. Imports nothing heavy."""

import os
import platform
import resource
import sys
import time

_IMPORTED = time.time()
RELAUNCHED = "SFT_RELAUNCHED"
# Set before anything heavy is imported: no advice about frameworks that are rightly missing, no import of torch where
# it happens to be installed, no fork warnings from tokenizers.
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "USE_TORCH": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "GRPC_VERBOSITY": "ERROR",
}
# Large pages where the program asks for much memory: fresh buffers of a training step on a CPU cost a third of its
# time in page faults without. Read by glibc as the process starts, hence the relaunch.
HUGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def quiet() -> None:
    """Put the environment of this process in order; the user's own settings stay."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


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
