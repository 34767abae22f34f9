"""What the environment keeps secret reaches neither the disk nor a log, however a run ends."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ONE_SHAPE, SMALL, write_model

from sft_jax import machine
from sft_jax.config.read import write_config
from sft_jax.config.schema import Config

CANARY = "cAnArY"
SECRETS = {
    "HF_TOKEN": "hf_" + CANARY + "0123456789AbCdEfGhIjKlMnOpQrSt",
    "WANDB_API_KEY": CANARY + "fedcba9876543210fedcba9876543210ab",
    "AWS_SECRET_ACCESS_KEY": CANARY + "/0123456789/abcdefghijklmnopqrstuv",
    "MADE_UP_PASSWORD": CANARY + "-correct-horse-battery-staple",
    "HTTPS_PROXY": f"http://me:{CANARY}@127.0.0.1:9",
}


@pytest.fixture
def train(configure: Callable[..., Config], tmp_path: Path) -> Callable[..., tuple[int, bytes]]:
    """`train("key=value", ...)`: (exit code, all that was said and written) of `sft-jax train` among the secrets."""
    model = write_model(tmp_path / "model", SMALL)
    base = configure(f"model.source={model}", ONE_SHAPE, "train.epochs=1", "train.steps=2", "eval.every=never")
    (tmp_path / "base.yaml").write_text(write_config(base))

    def run(*overrides: str, **more: Any) -> tuple[int, bytes]:
        environment = {
            **os.environ,
            **SECRETS,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_ENDPOINT": f"http://me:{CANARY}@127.0.0.1:9",  # where nobody answers
            machine.RELAUNCHED: "1",
        }
        command = [sys.executable, "-m", "sft_jax", "train", str(tmp_path / "base.yaml"), *overrides]
        done = subprocess.run(command, env=environment, capture_output=True, **more)
        written = [file.read_bytes() for file in sorted((tmp_path / "run").rglob("*")) if file.is_file()]
        return done.returncode, b"\n".join([done.stdout, done.stderr, *written])

    return run


def test_a_run_that_ends_well(train, tmp_path):
    """R37, R38: secrets are in no file of a run and in nothing it says; others may not write to its directory."""
    code, said = train(umask=0)
    assert code == 0, said.decode(errors="replace")
    assert CANARY.encode() not in said
    assert b"sft-jax predict" in said and b'"versions"' in said, "the control: what was said and written is looked at"
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) & 0o027 == 0
    assert [f for f in (tmp_path / "run").rglob("*") if f.stat().st_mode & 0o022] == []


def test_a_run_that_fails(train):
    """R37: a run whose loss leaves the numbers ends without a word of them."""
    code, said = train("optim.name=sgd", "optim.lr=1e30", "optim.clip=null", "train.steps=6")
    assert code == 76 and b"the checkpoints before it are good" in said
    assert CANARY.encode() not in said


@pytest.mark.parametrize(
    "override", ["model.source=someone/private", "data.source={kind: hub, name: someone/private, validation: null}"]
)
def test_a_run_that_cannot_reach_the_hub(train, override):
    """R37: what the hub's client says of a name that is not to be had is quoted without token, password or proxy."""
    code, said = train(override)
    assert code == 65 and b"'someone/private'" in said and b"Traceback" not in said, said.decode(errors="replace")
    assert CANARY.encode() not in said
