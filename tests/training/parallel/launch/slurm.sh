#!/bin/bash
# Partition, account, time limit and CPUs are your cluster's: sbatch --time=12:00:00 --cpus-per-task=16 … THIS_FILE
#SBATCH --job-name=hds_100m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# 120 s before the time limit: ask the training processes to save and stop, then queue the job again.
stopped=
trap 'stopped=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

export OMP_NUM_THREADS=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes 2 --nproc-per-node 8 \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 100 \
  -m memlib train hds_100m parallel.distributed_strategy=fsdp training.device=cuda --out runs/hds_100m --resume &
training=$!
wait "$training"
status=$?
if [ -n "$stopped" ]; then # the signal ended the first wait
  wait "$training"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
