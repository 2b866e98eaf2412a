#!/bin/bash
# Preparing text on many machines: sbatch docs/cluster/prepare.sh TEXT OUTPUT [--option value ...]
# A task that failed is submitted again with --array=NUMBER; when all are done, on one machine, the same without --shard
# verifies every piece and joins them: treadle data prepare TEXT --output OUTPUT [--option value ...]
#SBATCH --job-name=treadle-prepare
#SBATCH --array=0-15
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
source "${TREADLE_ENV:-.venv}/bin/activate"
text=$1 output=$2
shift 2
treadle data prepare "$text" --output "$output" --workers "${SLURM_CPUS_PER_TASK:-1}" \
  --shard "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT" "$@"
