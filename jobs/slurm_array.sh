#!/usr/bin/env bash
# Runs that differ in one variable, under Slurm: one element of a job array for each value, such as seeds or a sweep.
#   sbatch --array=0-3 jobs/slurm_array.sh FOLDER DECK run%seed=1,2,3,4 [--set GROUP%NAME=VALUE]...
# Element i trains with value i, counted from 0, in FOLDER/NAME-VALUE (FOLDER/seed-1), and is stopped, requeued and resumed
# like a job of slurm.sh, which runs it. `--array=0-3%2` runs two at a time. Then: doc/analysis/compare_runs.py FOLDER/*
#SBATCH --job-name=viaduct
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
usage='usage: sbatch --array=0-LAST jobs/slurm_array.sh FOLDER DECK GROUP%NAME=VALUE,VALUE... [--set GROUP%NAME=VALUE]...'
folder=${1:?$usage}
deck=${2:?$usage}
sweep=${3:?$usage}
shift 3
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
# The other scripts: those of the installation that this script is part of, else those of the source tree, which is the
# working folder. Slurm runs a copy of this script from elsewhere: `make install` writes its PREFIX here.
prefix=
here=$(cd "$(dirname "$0")" && pwd)
[[ $here != */share/viaduct/jobs ]] || prefix=${here%/share/viaduct/jobs}

IFS=, read -r -a values <<<"${sweep#*=}"
element=${SLURM_ARRAY_TASK_ID:?$usage}
if [[ $sweep != *%*=* ]] || [ "$element" -ge ${#values[@]} ]; then
  echo "slurm_array.sh: element $element of '$sweep', which has ${#values[@]} value(s), counted from 0. $usage" >&2
  exit 2
fi
variable=${sweep%%=*}
value=${values[element]}
# A name for a folder: without quotes, and without slashes.
name=${variable#*%}-${value//[\'\"]/}
exec bash "${prefix:+$prefix/share/viaduct/}jobs/slurm.sh" "$deck" --set "$variable=$value" --set "run%directory=$folder/${name//\//_}" "$@"
