#!/usr/bin/env bash
# Ours against PyTorch on a CPU, both at their best: float32 and bfloat16, in turns.
#   benchmarks/cpu.sh --ours-python PATH --peer-python PATH [options of benchmarks/accelerator.py]
# Ours is fastest on Python 3.12 or later with jax 0.12; the peers are what torch is installed for.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu
exec "${PYTHON:-python3}" benchmarks/accelerator.py --cpu --dtypes float32,bfloat16 \
  --jobs bert-base,vit-base,resnet-50,resnet-50-frozen --peers loop --minutes 30 --limit 300 "$@"
