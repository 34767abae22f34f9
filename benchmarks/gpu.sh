#!/usr/bin/env bash
# Everything that is known of speed on a GPU, in one command: tests that need one, then ours against PyTorch.
#   benchmarks/gpu.sh [--wheels DIR] [options of benchmarks/accelerator.py]
# The interpreter is $PYTHON, else python3: it must have jax with CUDA and torch. With --wheels DIR, what it lacks is
# installed from there, without a network, into an environment of its own that sees its packages; README.md says how to
# fill DIR.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [[ ${1:-} == --wheels ]]; then
  wheels=$2
  shift 2
  home=${VENV:-build/gpu-venv}
  "$python" -m venv --system-site-packages "$home"
  # An environment made from another environment sees the packages of the first one's base, not its own: name them.
  here=$("$python" -c 'import site, sys; print("\n".join(site.getsitepackages()))')
  there=$("$home/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  printf '%s\n' "$here" > "$there/zz-below.pth"
  "$home/bin/python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" "$wheels"/*.whl
  python=$home/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" benchmarks/accelerator.py "$@"
