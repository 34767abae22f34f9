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

# Runs the command as process number $1. What waits and what prefixes outlives a signal, so that last words are shown.
run() {
  local rank=$1
  shift
  trap : INT TERM
  SFT_PROCESS_ID=$rank "$@" </dev/null 2>&1 | prefix "$rank"
}

prefix() {
  local line
  trap '' INT TERM
  while IFS= read -r line || [[ -n $line ]]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

# Sends a signal to the process groups of all that still run.
signal_all() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    kill "-$1" -- "-$pid" 2>/dev/null || true
  done
}

# Takes note of a process that has ended: keeps the worst exit code, unless this script ended it.
reap() {
  local pid=$1 code=0
  wait "$pid" 2>/dev/null || code=$?
  if [[ -n $ending && ($code == 143 || $code == 137 || $code == 130) ]]; then
    return
  fi
  if ((code > worst)); then
    worst=$code
  fi
}

# Begins to end all: sends a signal, and sets the time after which there will be no mercy.
end_all() {
  ending=$1
  deadline=$((SECONDS + $2))
  signal_all "$1"
}

pids=() # of the processes that still run; each leads a group of its own
worst=0
asked=""  # the signal that this script was sent
ending="" # the signal that this script has sent to the rest
deadline=0
trap 'asked=INT' INT
trap 'asked=TERM' TERM
trap 'signal_all KILL' EXIT

port=$(free_port)
export SFT_COORDINATOR="127.0.0.1:$port" SFT_NUM_PROCESSES="$count"
set -m # job control: every process leads a group, so that its children end with it, and takes SIGINT
for ((rank = 0; rank < count; rank++)); do
  run "$rank" "$@" &
  pids+=("$!")
done
set +m

while ((${#pids[@]})); do
  sleep 0.1 || true
  left=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
    else
      reap "$pid"
    fi
  done
  pids=(${left[@]+"${left[@]}"})
  if [[ -n $asked && -z $ending ]]; then
    end_all "$asked" "$grace"
  elif [[ $worst != 0 && -z $ending ]]; then
    echo "launch/local.sh: a process ended with exit code $worst; ending the others" >&2
    end_all TERM 5
  elif [[ -n $ending ]] && ((SECONDS >= deadline)); then
    signal_all KILL
  fi
done

if [[ -n $asked && $worst == 0 ]]; then
  case $asked in INT) worst=130 ;; *) worst=143 ;; esac
fi
exit "$worst"
