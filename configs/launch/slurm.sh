#!/usr/bin/env bash
# Submit one stage to Slurm; the number of nodes is given there, account and partition as your cluster wants them:
#   sbatch --nodes 8 configs/launch/slurm.sh cpt configs/qwen2.5-72b-cpt.yaml run.out=runs/cpt
# Ten minutes before its time is up the job saves and ends; submitted again, it goes on from there.
#SBATCH --job-name medtrain
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --exclusive
#SBATCH --time 24:00:00
#SBATCH --signal USR1@600
#SBATCH --output slurm-%j.log
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: sbatch --nodes N $0 cpt|rpo CONFIG.yaml [KEY=VALUE ...]" >&2
    exit 2
fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD="$head:$((29500 + SLURM_JOB_ID % 1000))"
export NODES=$SLURM_JOB_NUM_NODES
# Slurm runs a copy of this file from its spool folder; the other script lies in the folder the job was submitted from.
launch=${MEDTRAIN_LAUNCH:-$SLURM_SUBMIT_DIR/configs/launch/torchrun.sh}
# One torchrun a node; NODE_RANK is known only inside the task.
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID GPUS=${SLURM_GPUS_ON_NODE:-8} exec bash "$0" "$@"' "$launch" "$@"
