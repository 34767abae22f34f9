"""What XLA makes of our steps for GPUs or TPUs that are not here: bytes at once, moved and sent. Runs nothing.

jax compiles for a description of a device as it does for the device, but for what it would pick by time: products on a
GPU are Triton's then, and convolutions are not chosen. Needs jax 0.11 with its CUDA plugin or with libtpu (`pip install
'jax[cuda13]'`, `'jax[tpu]'`), and no device. A program that the compiler cannot take fails here as it would there.
Bytes are those of one device.
"""

import argparse
import collections
import math
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table
from speed_jobs import JOBS, make
from speed_ours import settings
from text_classification import LEAST_WIDTH, names

from sft_jax.config.read import read_config
from sft_jax.estimate import largest, without_weights
from sft_jax.nn import flash
from sft_jax.run import train_program
from sft_jax.train.state import abstract_frozen, abstract_state
from sft_jax.train.step import needs

GIB = 1 << 30
GPU = "h200"
NEEDED = "as pip install 'jax[cuda13]' or 'jax[tpu]' has it"
SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1, "s64": 8, "u64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
NOTHING = ("parameter", "get-tuple-element", "bitcast", "tuple", "constant")  # operations that move nothing
# Clock in GHz; of a multiprocessor, by the number that XLA gives a type: (units, operations of one in a cycle).
CLOCK, MATRIX_CLOCK = 1.98, 1.83
SCALAR = {4: (64, 1), 8: (64, 1), 10: (128, 2), 11: (128, 1), 12: (64, 1), 16: (128, 2)}
MATRIX = {
    2: (4, 1024),
    6: (4, 1024),
    10: (4, 512),
    11: (4, 256),
    12: (4, 32),
    16: (4, 512),
    19: (4, 1024),
    20: (4, 1024),
}


def main() -> None:
    """Compile each, show what came out after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=names, default=",".join(JOBS))
    parser.add_argument("--ours", nargs="+", default=[""], metavar="KEY=VALUE,...", help="in several ways")
    parser.add_argument("--device", default=GPU, help=f"{GPU}, {GPU}:8 for eight of them, or TPUs, such as v5e:2x4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dry-run", action="store_true", help="sizes that compile in seconds")
    parser.add_argument("--save", type=Path, help="where the programs are written")
    options = parser.parse_args()
    try:
        device = pretend(options.device)
    except (ImportError, RuntimeError) as error:  # no plugin, one that takes no description, or none of this name
        parser.error(f"jax compiles for no {options.device} here ({error}); it takes 0.11 on, {NEEDED}")
    console = Console(width=max(Console().width, LEAST_WIDTH))
    columns = ("held, GiB", "meanwhile, GiB", "moved, GB", "by products, GB", "sent, GB", "compiled in, s")
    shown = Table("job", "in this way", *columns)
    for name in options.jobs:
        for number, how in enumerate(options.ours):
            job = JOBS[name].shrunk() if options.dry_run else JOBS[name]
            with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
                directory = make(job, Path(scratch) / job.name)
                given = settings(job, directory, options.dtype, [word for word in how.split(",") if word])
                run = without_weights(read_config([], given))
                program = train_program(
                    run,
                    abstract_state(run.model.template, run.frozen, run.begin),
                    abstract_frozen(run.model.template, run.frozen, run.dtype, run.few),
                )
                executable = program.compile(largest(run))
            held, meanwhile = needs(executable)
            text = executable.as_text()
            if options.save:
                options.save.mkdir(parents=True, exist_ok=True)
                (options.save / f"{name}-{number}.hlo").write_text(text)
            found = moved(text)
            sizes = held / GIB, meanwhile / GIB, *(n / 1e9 for n in (found.total(), found["products"], sent(text)))
            row = [*sizes, program.seconds]
            shown.add_row(name, how, *(f"{value:.2f}" for value in row))
            print(f"{name} {how}: compiled in {program.seconds:.0f} s on {device}", file=sys.stderr)
    console.print(shown)


def pretend(name: str) -> str:
    """Have jax and sft_jax take what is described for the devices that are here; what they call themselves."""
    kind, _, count = name.partition(":")
    platform = "gpu" if kind == GPU else "tpu"
    if platform == "gpu":
        pretend_nvidia()
        shape = {"topology": f"1x1x{count or 1}", "target_config": described()}
        devices = topologies.get_topology_desc("described", "cuda", **shape).devices
    else:
        devices = topologies.get_topology_desc(name, "tpu").devices
    jax.devices = lambda *_: devices
    jax.default_backend = lambda: platform
    return f"{len(devices)} {devices[0].device_kind}"


def pretend_nvidia() -> None:
    """What is asked of the GPU itself, besides by XLA."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax._src.pallas.triton import gpu_info

    cudnn.cuda_versions = types.SimpleNamespace(cudnn_get_version=lambda: 91500)
    cudnn.check_compute_capability = lambda version: tuple(map(int, version.split("."))) <= (9, 0)
    cudnn.is_cuda_compute_capability_equal = lambda version: version == "9.0"
    gpu_info.get_gpu_info = lambda: gpu_info.GpuInfo(gpu_version=None, arch_name="9.0", compute_capability=90)
    flash.interpreted = lambda: False


def described() -> str:
    """An H200 in XLA's words (`GpuTargetConfigProto`)."""

    def rates(units: dict[int, tuple[int, int]], clock: float) -> Iterator[str]:
        for key, (count, each) in units.items():
            value = f"clock_rate_ghz: {clock} units_per_core: {count} ops_per_clock: {each}"
            yield f"rate_infos {{ key: {key} value {{ {value} }} }}"

    return f"""
      gpu_device_info {{
        name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
        cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
        core_count: 132 fpus_per_core: 128 clock_rate_ghz: {CLOCK} threads_per_warp: 32
        threads_per_block_limit: 1024 threads_per_core_limit: 2048
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
        device_memory_size: 151397597184 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
        pcie_bandwidth: 34359738368 device_address_bits: 64 ecc_enabled: true
        driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
        scalar_unit_description {{ {" ".join(rates(SCALAR, CLOCK))} }}
        matrix_unit_description {{ {" ".join(rates(MATRIX, MATRIX_CLOCK))} }}
      }}
      platform_name: "CUDA" device_description_str: "NVIDIA H200"
      dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    """


def moved(text: str) -> collections.Counter[str]:
    """Bytes that the operations of a program read and write, by kind; those of a loop's body count once."""
    found: collections.Counter[str] = collections.Counter()
    sizes: dict[str, int] = {}
    for line in text[text.index("\nENTRY") :].splitlines():
        match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.+?) ([\w\-]+)\((.*)", line)
        if not match:
            continue
        name, kind, operation, rest = match.groups()
        sizes[name] = size(kind)
        if operation not in NOTHING:
            read = sum(sizes.get(given, 0) for given in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            found["products" if "gemm" in name else "others"] += sizes[name] + read
    return found


def sent(text: str) -> int:
    """Bytes that a device has of others, or of sums over all: what collectives give, those of a loop's body once."""
    given = re.findall(rf"= (.+?) (?:{'|'.join(COLLECTIVES)})(?:-done)?\(", text)
    return sum(map(size, given))


def size(kind: str) -> int:
    """Bytes of a type of XLA, which may be several."""
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", kind)
    return sum(SIZES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in shapes)


if __name__ == "__main__":
    main()
