#!/usr/bin/env bash
# A training run on this machine alone, or over a host file: jobs/mpirun.sh RANKS DECK [--set GROUP%NAME=VALUE]...
# The cores are shared out over the ranks. HOSTFILE names the machines where there are several. Ctrl-C ends the run;
# `kill -USR1` to this script makes it write a checkpoint first (exit status 75). The same command goes on from there.
set -u
ranks=${1:?usage: jobs/mpirun.sh RANKS DECK [--set GROUP%NAME=VALUE]...}
deck=${2:?usage: jobs/mpirun.sh RANKS DECK [--set GROUP%NAME=VALUE]...}
shift 2
options=(--oversubscribe --bind-to none)
[ -z "${HOSTFILE:-}" ] || options+=(--hostfile "$HOSTFILE")
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

mpirun "${options[@]}" -n "$ranks" -x OMP_NUM_THREADS "${VIADUCT:-build/viaduct}" train "$deck" "$@" &
run=$!
trap 'kill -USR1 $run' USR1
trap 'kill -TERM $run' TERM
status=0
while kill -0 $run 2>/dev/null; do # wait returns on each signal
  wait $run
  status=$?
done
# The step may have ended while wait returned for a signal; then its status is still to be had.
if [ $status -gt 128 ]; then
  wait $run 2>/dev/null
  last=$?
  [ $last = 127 ] || status=$last
fi
exit $status
