#!/bin/bash
# Train on the nodes of a Slurm job. Submit it from the root of the repository:
#
#     sbatch --nodes 4 --gpus-per-node 8 launch/slurm.sh --preset 1b --data texts/ --out runs/1b
#
# Arguments after the script go to train.py. One torchrun per node starts a process per GPU (or
# NPROC_PER_NODE processes), and restarts them up to MAX_RESTARTS times (3) after one has died. LEAD
# seconds before the time limit training saves and stops, and the job is requeued. It continues on
# as many nodes as it then gets. Slurm itself requeues a job that it preempts or whose node fails.
# A job that scancel ends is not requeued. To change LEAD, change it below and in --signal.
#
#SBATCH --job-name=train
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

LEAD=180
STOPPED=75 # train.py's exit code: the same command continues
# torchrun kills its workers after this time; train.py takes it as its --grace.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$((LEAD - 30))}"

# Slurm runs a copy of this script in the directory where sbatch ran.
if [ ! -f launch/train.py ]; then
    echo "error: $PWD has no launch/train.py: submit the job from the root of the repository." >&2
    exit 2
fi

stopping=no
stop() { # only the batch shell gets Slurm's signal; torchrun and train.py save on SIGTERM
    stopping=yes
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1
trap '' TERM # outlive it, to wait for training to end

# This shell runs on the first node, where torchrun opens the port.
port="${RDZV_PORT:-$(python -c 'import socket
with socket.socket() as free:
    free.bind(("", 0))
    print(free.getsockname()[1])')}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# srun gives a task one CPU unless it is told otherwise.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" \
    python launch/elastic.py \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:$port" \
    launch/train.py "$@" &
training=$!
wait "$training"
code=$?
while kill -0 "$training" 2> /dev/null; do # wait also returns when a trap has run
    wait "$training"
    code=$?
done
# Codes 0 (done), 1 (failed) and 2 (wrong usage) stand. srun returns the highest code of all nodes,
# and may have killed the last torchrun, so any higher code means stopped. After scancel and after
# preemption the job is not RUNNING, and must not be requeued.
if [ "$stopping" = yes ] && [ "$code" -gt 2 ]; then
    code=$STOPPED
    if [[ "$(scontrol show job "$SLURM_JOB_ID")" == *JobState=RUNNING* ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
