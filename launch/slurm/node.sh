#!/bin/bash
# Starts the ranks of one node; train.sbatch runs it once on each.
set -euo pipefail

# SLURM signals every process of a step, and a launcher would die of SIGUSR1. Ranks inherit that it is ignored, but listen while they train.
trap '' USR1

logs=$RANK_LOGS/node-$SLURM_NODEID-start-${SLURM_RESTART_COUNT:-0}
case $LAUNCHER in
torchrun)
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[rank \${rank}] " # local ranks would look the same on all nodes
    exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$PROCS_PER_NODE" --node-rank "$SLURM_NODEID" --rdzv-id "$SLURM_JOB_ID" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --log-dir "$logs" --tee 3 launch/train.py "$@"
    ;;
deepspeed)
    # What `deepspeed` starts on every node, by ssh. With --no_ssh it would stand between SLURM and this, and die of SIGTERM at once.
    devices=$(cut -d , -f "1-$PROCS_PER_NODE" <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((PROCS_PER_NODE - 1)))}")
    world=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/.*/\"&\": [$devices]/" | paste -s -d ,)
    exec python -m deepspeed.launcher.launch --world_info "$(base64 -w 0 <<<"{$world}")" --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --enable_each_rank_log "$logs" launch/train.py "$@"
    ;;
*)
    echo "LAUNCHER is $LAUNCHER; it can be torchrun or deepspeed" >&2
    exit 2
    ;;
esac
