# shellcheck shell=bash
# What the job scripts share: run Python once per task of the allocation; requeue the job when it asks, or crashes.
#   source launch/slurm/run.sh launch/train.py [options]
# The words after run.sh are those of Python. Sourced, because bash reads a sourced file whole: editing it does not
# disturb a running job.
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
python=${FLALLM_PYTHON:-$SLURM_SUBMIT_DIR/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "Python must be an executable, got '$python'. Install .venv (see README.md) or set FLALLM_PYTHON." >&2
    exit 2
fi
max_restarts=${FLALLM_MAX_RESTARTS:-3}
if [[ ! $max_restarts =~ ^[0-9]+$ ]]; then
    echo "FLALLM_MAX_RESTARTS must be a number, got '$max_restarts'. Set 0 for no restart after a crash." >&2
    exit 2
fi

# "4" for one node, "4(x2)" for two, "5,4" where nodes differ. With --ntasks=9 --ntasks-per-node=5 it is "5(x2)". The
# number of all tasks is that of the submission: too large if scontrol has taken nodes from the job since.
tasks_per_node=${SLURM_TASKS_PER_NODE%%[(,]*}
num_tasks=$((tasks_per_node * SLURM_JOB_NUM_NODES))
if [[ $SLURM_TASKS_PER_NODE == *,* ]] || ((SLURM_NTASKS < num_tasks || SLURM_NTASKS % SLURM_JOB_NUM_NODES)); then
    echo "Every node must have the same number of tasks, got $SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes." \
        "Give sbatch --nodes and --ntasks-per-node instead of --ntasks." >&2
    exit 2
fi
if [[ -n ${SLURM_GPUS_ON_NODE:-} && $SLURM_GPUS_ON_NODE != "$tasks_per_node" ]]; then
    echo "Tasks per node must equal GPUs per node ($SLURM_GPUS_ON_NODE), got $tasks_per_node." \
        "Give sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE." >&2
    exit 2
fi

# The rendezvous. Rank 0 runs on the first node, as this script does. port.py reserves the port until this shell ends,
# which closes its input.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
coproc reserved { exec "$python" "$(dirname "${BASH_SOURCE[0]}")/port.py" "$SLURM_JOB_ID"; }
read -r MASTER_PORT <&"${reserved[0]}"
export MASTER_ADDR MASTER_PORT
# sbatch copies the environment of the shell that submitted; ranks set there by torchrun or mpirun would be used instead of
# SLURM's.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE "${!OMPI_COMM_WORLD_@}"

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05 srun does not take it from sbatch
export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK
export PYTHONUNBUFFERED=1 # the last lines before a kill are the ones that matter

# A job that scancel or scontrol is ending already is not ours to bring back.
is_running() { [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; }

# Rank 0, which is on this node, makes this file when it refuses the command line. srun's own code would not say so:
# it is the highest of all tasks, and those that --kill-on-bad-exit ends have 137 or 143.
FLALLM_REFUSED=$(mktemp -u)
export FLALLM_REFUSED
# The number of restarts after a crash or a hang: SLURM_RESTART_COUNT also counts requeues that are neither.
export FLALLM_RESTARTS=${FLALLM_JOB_FOLDER:-$SLURM_SUBMIT_DIR}/.restarts-$SLURM_JOB_ID

# One task. Code 75 (EX_TEMPFAIL) means "all ranks have saved, run me again". srun must not see it: ranks end at
# slightly different times, --kill-on-bad-exit would kill the slower ones, and srun would then return their 143.
# SLURM signals every process of a task, so this shell has to outlive USR1 and TERM; the trap is not inherited.
# shellcheck disable=SC2016
task='
trap : USR1 TERM
"$@"
code=$?
if ((code == 2)); then
    if ((SLURM_PROCID == 0)); then touch "$FLALLM_REFUSED"; else sleep 10; fi # rank 0 refuses, too
fi
((code == 75)) || exit "$code"
((SLURM_PROCID == 0)) || exit 0
is_running || exit 0
echo "Saved before the end: requeueing job $SLURM_JOB_ID."
rm -f "$FLALLM_RESTARTS" # the run has made progress since its last crash
scontrol requeue "$SLURM_JOB_ID" && exit 0
echo "Job $SLURM_JOB_ID could not be requeued. Submit the same command again to resume." >&2
exit 75
'
code=0
srun --ntasks="$num_tasks" --kill-on-bad-exit=1 --export=ALL bash -c "$(declare -f is_running)$task" task "$python" "$@" || code=$?
if [[ -e $FLALLM_REFUSED ]]; then
    rm -f "$FLALLM_REFUSED"
    code=2
fi

# A crash, or a hang that the trainer has ended (code 124). Code 2 is a wrong option, which would be refused again; 75 is
# a cluster that does not requeue.
num_restarts=0
[[ ! -f $FLALLM_RESTARTS ]] || num_restarts=$(<"$FLALLM_RESTARTS")
if ((code != 0 && code != 2 && code != 75)) && is_running; then
    if ((num_restarts < max_restarts)); then
        echo $((num_restarts + 1)) >"$FLALLM_RESTARTS"
        echo "Job $SLURM_JOB_ID crashed with code $code: restart $((num_restarts + 1)) of $max_restarts." >&2
        scontrol requeue "$SLURM_JOB_ID" && exit "$code"
    fi
    echo "Job $SLURM_JOB_ID crashed with code $code after $num_restarts restarts." \
        "Fix the cause and submit the same command again to resume." >&2
fi
# A job that was requeued is not running any more, and keeps its count.
if is_running; then rm -f "$FLALLM_RESTARTS"; fi
exit "$code"
