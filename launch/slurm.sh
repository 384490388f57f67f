#!/bin/bash
# Train on the nodes of a Slurm job:
#
#     sbatch --nodes 4 --gpus-per-node 8 launch/slurm.sh --preset 1b --data texts/ --out runs/1b
#
# Arguments after the script go to train.py. One torchrun per node starts a process per GPU (or
# NPROC_PER_NODE of them). Two minutes before the time limit, and when Slurm preempts the job,
# training saves and stops, and the job is requeued to continue on as many nodes as it then gets.
#
#SBATCH --job-name=train
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

stopping=no
stop() { # train.py saves on SIGTERM, which Slurm passes to the processes of the job's steps
    stopping=yes
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1 TERM

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:${RDZV_PORT:-29500}" \
    launch/train.py --resume auto "$@" &
training=$!
wait "$training"
code=$?
while kill -0 "$training" 2> /dev/null; do # a trap interrupts wait before the process has ended
    wait "$training"
    code=$?
done
if [ "$stopping" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
