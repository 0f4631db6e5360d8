#!/bin/bash
# Distil DiT-XL/2 on 2 nodes of 8 GPUs: sbatch assets/slurm.sh. Submitted again, it continues where it stopped.
#SBATCH --job-name=ard
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$MASTER_ADDR:29500" \
    train_ARD.py --preset ard-n6-m4-s4 --precision bf16 --compile \
    --data-path data/trajectories --run-dir results/ard-n6-m4-s4
