#!/usr/bin/env bash
# Start one stage on this node's GPUs, or on several nodes by calling this on each:
#   configs/launch/torchrun.sh cpt configs/qwen2.5-7b-cpt.yaml run.out=runs/cpt
#   NODES=8 NODE_RANK=0 HEAD=node0:29500 configs/launch/torchrun.sh rpo configs/qwen2.5-72b-rpo.yaml    # and 1 to 7 elsewhere
# run.out must be a folder that all nodes share. SIGTERM and SIGUSR1 finish the step and save.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 cpt|rpo CONFIG.yaml [KEY=VALUE ...]" >&2
    exit 2
fi
NODES=${NODES:-1}
GPUS=${GPUS:-8} # a node
# Fewer holes in memory where sizes change from batch to batch.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

if [ "$NODES" = 1 ]; then
    where=(--standalone)
else
    : "${NODE_RANK:?which node this is, from 0}" "${HEAD:?host:port of node 0}"
    where=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}")
fi
exec torchrun "${where[@]}" --nproc-per-node "$GPUS" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --no-python medtrain "$@"
