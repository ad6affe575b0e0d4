#!/usr/bin/env bash
# A training run under Slurm that survives its time limit: it receives SIGUSR1 120 s before, writes a checkpoint, and is requeued.
#   sbatch jobs/slurm.sh input/enwik8_adaptive_span.nml [--set GROUP%NAME=VALUE]...
# sbatch's options override the lines below: `sbatch --nodes=1 --time=30 jobs/slurm.sh ...`. Whole nodes are taken and their
# CPUs divided among the ranks; with --cpus-per-task=N each rank gets N.
#SBATCH --job-name=viaduct
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# With GPUs: as many tasks a node as GPUs. Remove one # from each of these lines:
##SBATCH --gpus-per-node=4
##SBATCH --ntasks-per-node=4
set -u
deck=${1:?usage: sbatch jobs/slurm.sh DECK [--set GROUP%NAME=VALUE]...}
shift
# Slurm runs a copy of this script: relative paths are those of the folder of submission.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
# The program and its decks: those of the installation that this script is part of, else those of the source tree, which
# is the working folder. A batch system runs a copy of this script from elsewhere: `make install` writes its PREFIX here.
prefix=
here=$(cd "$(dirname "$0")" && pwd)
[[ $here != */share/viaduct/jobs ]] || prefix=${here%/share/viaduct/jobs}
program=build/viaduct
[ -z "$prefix" ] || program=$prefix/bin/viaduct
[ -e "$deck" ] || [ ! -e "$prefix/share/viaduct/$deck" ] || deck=$prefix/share/viaduct/$deck
# Before Slurm 22.05 srun took the number of CPUs of a task from sbatch; since then it needs the option.
tasks=${SLURM_NTASKS_PER_NODE:-1}
cpus=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / tasks))}
[ "$cpus" -gt 0 ] || cpus=1
options=(--mpi=pmix --cpus-per-task="$cpus")
# Each rank must see all GPUs of its node, so that NCCL's ranks reach each other's memory; Viaduct chooses one for each.
# Options that count GPUs by tasks show each task its own only, unless they are not bound.
[ -z "${SLURM_GPUS_PER_TASK:-}${SLURM_NTASKS_PER_GPU:-}" ] || options+=(--gpu-bind=none)
export OMP_NUM_THREADS=$cpus OMP_PLACES=cores OMP_PROC_BIND=close

# The signal comes to this shell alone (B:), which passes it on to every rank.
srun "${options[@]}" "${VIADUCT:-$program}" train "$deck" "$@" &
step=$!
trap 'kill -USR1 $step' USR1 TERM

# wait returns on each signal, while the step still writes its checkpoint: repeat until the step has ended.
status=0
while kill -0 $step 2>/dev/null; do
  wait $step
  status=$?
done
# If the step ended while wait returned for a signal, its status has not been collected yet.
if [ $status -gt 128 ]; then
  wait $step 2>/dev/null
  last=$?
  [ $last = 127 ] || status=$last
fi

# A job that scancel or Slurm ends gets a signal too, and is no longer running: whether it comes back is Slurm's to say.
if [ $status = 75 ]; then
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
  echo "Stopped after a checkpoint; restart ${SLURM_RESTART_COUNT:-0}, the job is ${state:-gone}."
  [ "$state" != RUNNING ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
