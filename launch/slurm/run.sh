# shellcheck shell=bash
# What the .sbatch files share: run a Python file once per task of the allocation, and requeue the job when it asks.
#   source launch/slurm/run.sh launch/train.py [options]
# Sourced, because bash reads a sourced file whole: editing it does not disturb a running job.
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
entry=$1
shift
python=${FLALLM_PYTHON:-$SLURM_SUBMIT_DIR/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "Python must be an executable, got '$python'. Install .venv (see README.md) or set FLALLM_PYTHON." >&2
    exit 2
fi

tasks_per_node=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
if [[ -n ${SLURM_GPUS_ON_NODE:-} && $SLURM_GPUS_ON_NODE != "$tasks_per_node" ]]; then
    echo "Tasks per node must equal GPUs per node ($SLURM_GPUS_ON_NODE), got $tasks_per_node." \
        "Give sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE." >&2
    exit 2
fi

# The rendezvous: rank 0 runs on the first node. Ports 10000 to 29999 are below those that Linux assigns.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
# sbatch copies the environment of the shell that submitted; ranks set there by torchrun or mpirun would be used instead of
# SLURM's.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE "${!OMPI_COMM_WORLD_@}"

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05 srun does not take it from sbatch
export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK
export PYTHONUNBUFFERED=1 # the last lines before a kill are the ones that matter

# One task. Code 75 (EX_TEMPFAIL) means "all ranks have saved, run me again". srun must not see it: ranks end at
# slightly different times, --kill-on-bad-exit would kill the slower ones, and srun would then return their 143.
# SLURM signals every process of a task, so this shell has to outlive USR1 and TERM; the trap is not inherited.
# shellcheck disable=SC2016
task='
trap : USR1 TERM
"$@"
code=$?
((code == 75)) || exit "$code"
((SLURM_PROCID == 0)) || exit 0
# A job that scancel or scontrol is ending already is not ours to bring back.
[[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]] || exit 0
echo "Saved before the end: requeueing job $SLURM_JOB_ID."
scontrol requeue "$SLURM_JOB_ID" && exit 0
echo "Job $SLURM_JOB_ID could not be requeued. Submit the same command again to resume." >&2
exit 75
'
srun --kill-on-bad-exit=1 --export=ALL bash -c "$task" task "$python" "$entry" "$@"
