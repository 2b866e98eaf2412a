#!/bin/bash
# A training on SLURM, over any number of machines: sbatch docs/cluster/slurm.sh RECIPE [--key value ...]
# Submit it again, or let it requeue itself, and it continues. TREADLE_ENV names the virtual environment.
#SBATCH --job-name=treadle
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
source "${TREADLE_ENV:-.venv}/bin/activate"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# One task is one process; treadle reads its place from SLURM. Five minutes before the limit every task gets SIGTERM, saves
# and ends with 143. When one dies the others end by themselves within a minute (75 or 137).
srun treadle train "$@"
code=$?
case $code in
  75|137|143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then scontrol requeue "$SLURM_JOB_ID"; exit 0; fi ;;
esac
exit $code
