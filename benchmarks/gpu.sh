#!/usr/bin/env bash
# Everything that is known of speed on a GPU, in one command: tests that need one, then ours against PyTorch.
#   benchmarks/gpu.sh [--wheels DIR] [options of benchmarks/accelerator.py]
# The interpreter is $PYTHON, else python3: it must have jax with CUDA and torch. With --wheels DIR, what it lacks is
# unpacked from there, without a network, beside its own packages; README.md says how to fill DIR.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=${SITE:-build/gpu-site}
# Runs write down which sft_jax they are of, and ask its metadata; a checkout that nobody installed has none.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
mkdir -p "$site/sft_jax-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: sft_jax\nVersion: %s\n' "$version" > "$site/sft_jax-$version.dist-info/METADATA"
if [[ ${1:-} == --wheels ]]; then
  # Not an environment of its own: one that is made from an environment does not see the packages of that one.
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$2"/*.whl
  shift 2
fi
export PYTHONPATH="$PWD:$(realpath "$site")${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" benchmarks/accelerator.py "$@"
