#!/usr/bin/env bash
# Several processes of one command on this machine, as if each were a host of its own:
#
#   launch/local.sh 2 sft-jax train configs/quickstart.yaml
#
# Each gets SFT_COORDINATOR (a free port of the loopback), SFT_NUM_PROCESSES and SFT_PROCESS_ID, and its lines are
# prefixed with its number. When one fails the others are ended too. Ctrl-C and SIGTERM are handed on to all, which
# have SFT_GRACE seconds (default 30) to finish. The exit code is the worst of those that ended by themselves.
set -euo pipefail

usage() {
  echo "usage: launch/local.sh PROCESSES COMMAND [ARGUMENT...]" >&2
  exit 2
}

[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || usage
count=$1
shift
grace=${SFT_GRACE:-30}

free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000)) # below the ports that the kernel hands out by itself
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  echo "launch/local.sh: no free port found between 20000 and 32000" >&2
  return 1
}

pids=()
asked="" # the signal that this script was sent

# Sends a signal to the process groups of all that still run.
signal_all() {
  local pid
  for pid in "${pids[@]}"; do
    kill "-$1" -- "-$pid" 2>/dev/null || true
  done
}

any_left() {
  local pid
  for pid in "${pids[@]}"; do
    if kill -0 -- "-$pid" 2>/dev/null; then
      return 0
    fi
  done
  return 1
}

# Sends a signal to all, and after so many seconds ends whatever is left.
end_all() {
  signal_all "$1"
  for ((tenth = 0; tenth < 10 * $2; tenth++)); do
    any_left || return 0
    sleep 0.1
  done
  signal_all KILL
}

trap 'asked=INT' INT
trap 'asked=TERM' TERM
trap 'signal_all KILL' EXIT

# Job control: every process leads a group of its own, so that its children can be ended with it, and takes SIGINT.
set -m
port=$(free_port)
export SFT_COORDINATOR="127.0.0.1:$port" SFT_NUM_PROCESSES="$count"
for ((rank = 0; rank < count; rank++)); do
  SFT_PROCESS_ID=$rank "$@" </dev/null > >(exec sed -u "s/^/[$rank] /") 2>&1 &
  pids+=("$!")
done

worst=0
ended=0 # 1 once the rest was ended by this script
for ((left = count; left > 0; left--)); do
  code=0
  wait -n || code=$?
  if [[ -n $asked && $ended == 0 ]]; then # `wait` was interrupted, nothing has ended by that
    left=$((left + 1))
    ended=1
    end_all "$asked" "$grace"
    continue
  fi
  if [[ $ended == 1 && ($code == 143 || $code == 137) ]]; then
    continue
  fi
  if ((code > worst)); then
    worst=$code
  fi
  if [[ $code != 0 && $ended == 0 ]]; then
    echo "launch/local.sh: a process ended with $code; ending the others" >&2
    ended=1
    end_all TERM 5
  fi
done

if [[ -n $asked && $worst == 0 ]]; then
  worst=$([[ $asked == INT ]] && echo 130 || echo 143)
fi
exit "$worst"
