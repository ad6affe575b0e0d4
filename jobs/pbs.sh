#!/usr/bin/env bash
# A training run under PBS.  qsub -v DECK=input/enwik8_adaptive_span.nml jobs/pbs.sh
# PBS sends TERM before the limit; this script sends USR1 to mpirun, and Viaduct writes a checkpoint and exits with status
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
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} OMP_PLACES=cores OMP_PROC_BIND=close

# mpirun kills its ranks some seconds after a TERM, perhaps during a checkpoint; it forwards USR1 and does nothing else.
mpirun --map-by ppr:2:node:PE="$OMP_NUM_THREADS" -x OMP_NUM_THREADS "${VIADUCT:-$program}" train "$deck" &
step=$!
trap 'kill -USR1 $step' TERM USR1
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
[ $status != 75 ] || qsub -v DECK="$deck" "${prefix:+$prefix/share/viaduct/}jobs/pbs.sh"
exit $status
