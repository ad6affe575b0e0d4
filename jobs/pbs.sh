#!/usr/bin/env bash
# A training run under PBS.
#   qsub -v DECK=input/enwik8_adaptive_span.nml jobs/pbs.sh
#   SET='run%seed=2 run%directory=runs/two' DECK=input/enwik8_adaptive_span.nml qsub -v DECK,SET jobs/pbs.sh
# SET holds GROUP%NAME=VALUE words, each for a --set, with blanks between them and none within.
# PBS sends TERM before the limit; this script sends USR1 to a rank, and Viaduct writes a checkpoint and exits with status
# 75. This script then submits itself again, and the new job resumes the run.
#PBS -N viaduct
#PBS -l select=2:ncpus=16:mpiprocs=2:ompthreads=8
#PBS -l walltime=04:00:00
#PBS -j oe
set -u
cd "${PBS_O_WORKDIR:-.}" || exit 1
deck=${DECK:?usage: qsub -v DECK=input/NAME.nml jobs/pbs.sh}
# The program and its decks: those of the installation that this script is part of, else those of the source tree, which
# is the working folder. A batch system runs a copy of this script from elsewhere: `make install` writes its PREFIX here.
prefix=
here=$(cd "$(dirname "$0")" && pwd)
[[ $here != */share/viaduct/jobs ]] || prefix=${here%/share/viaduct/jobs}
program=build/viaduct
[ -z "$prefix" ] || program=$prefix/bin/viaduct
[ -e "$deck" ] || [ ! -e "$prefix/share/viaduct/$deck" ] || deck=$prefix/share/viaduct/$deck
command=(train "$deck")
read -r -a words <<<"${SET:-}"
for word in ${words[@]+"${words[@]}"}; do command+=(--set "$word"); done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} OMP_PLACES=cores OMP_PROC_BIND=close

program=${VIADUCT:-$program}
mpirun --map-by ppr:2:node:PE="$OMP_NUM_THREADS" -x OMP_NUM_THREADS "$program" "${command[@]}" &
step=$!
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
# As USR1, because mpirun kills its ranks some seconds after a TERM, perhaps during a checkpoint.
trap 'stop_run $step "$program"' TERM USR1
status=0
while kill -0 $step 2>/dev/null; do # wait returns on each signal
  wait $step
  status=$?
done
# If the step ended while wait returned for a signal, its status has not been collected yet.
if [ $status -gt 128 ]; then
  wait $step 2>/dev/null
  last=$?
  [ $last = 127 ] || status=$last
fi
[ $status != 75 ] || DECK=$deck SET=${SET:-} qsub -v DECK,SET "${prefix:+$prefix/share/viaduct/}jobs/pbs.sh"
exit $status
