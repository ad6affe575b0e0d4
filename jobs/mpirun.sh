#!/usr/bin/env bash
# A training run on this machine alone, or over a host file: jobs/mpirun.sh RANKS DECK [--set GROUP%NAME=VALUE]...
# The cores are divided among the ranks. HOSTFILE names the machines if there are several. Ctrl-C stops the run;
# `kill -USR1` or -TERM to this script makes it write a checkpoint first (exit status 75). The same command resumes the run.
set -u
ranks=${1:?usage: jobs/mpirun.sh RANKS DECK [--set GROUP%NAME=VALUE]...}
deck=${2:?usage: jobs/mpirun.sh RANKS DECK [--set GROUP%NAME=VALUE]...}
shift 2
# The program and its decks: those of the installation that this script is part of, else those of the source tree, which
# is the working folder. A batch system runs a copy of this script from elsewhere: `make install` writes its PREFIX here.
prefix=
here=$(cd "$(dirname "$0")" && pwd)
[[ $here != */share/viaduct/jobs ]] || prefix=${here%/share/viaduct/jobs}
program=build/viaduct
[ -z "$prefix" ] || program=$prefix/bin/viaduct
[ -e "$deck" ] || [ ! -e "$prefix/share/viaduct/$deck" ] || deck=$prefix/share/viaduct/$deck
options=(--oversubscribe --bind-to none)
[ -z "${HOSTFILE:-}" ] || options+=(--hostfile "$HOSTFILE")
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

program=${VIADUCT:-$program}
mpirun "${options[@]}" -n "$ranks" -x OMP_NUM_THREADS "$program" train "$deck" "$@" &
run=$!
# stop_run MPIRUN PROGRAM: sends SIGUSR1 to a rank. MPIRUN is mpirun's process, PROGRAM what it runs. One rank is enough,
# because all ranks stop together. mpirun's children on this node are ranks; without one the signal goes to mpirun, which
# forwards it, but not on every node: where its hwloc loads NVIDIA's OpenCL driver the signal is lost. A rank is known by its
# command line, since a library may rename its main thread, which is the name that pgrep knows.
# shellcheck disable=SC2317 # the trap calls it
stop_run() {
  local process fields name
  for process in /proc/[0-9]*; do
    # ID (NAME) STATE PARENT ...
    { read -r fields <"$process/stat"; } 2>/dev/null || continue
    read -r _ fields _ <<<"${fields##*) }"
    [ "$fields" = "$1" ] || continue
    { IFS= read -r -d '' name <"$process/cmdline"; } 2>/dev/null || continue
    [ "${name##*/}" = "${2##*/}" ] || continue
    kill -USR1 "${process#/proc/}"
    return
  done
  kill -USR1 "$1"
}
trap 'stop_run $run "$program"' USR1 TERM
status=0
while kill -0 $run 2>/dev/null; do # wait returns on each signal
  wait $run
  status=$?
done
# If the step ended while wait returned for a signal, its status has not been collected yet.
if [ $status -gt 128 ]; then
  wait $run 2>/dev/null
  last=$?
  [ $last = 127 ] || status=$last
fi
exit $status
