"""`flallm checkpoints`: list, verify, export and remove the checkpoints of a run."""

from collections.abc import Sequence
from pathlib import Path

from flallm_ds.cli.checks import check_new_folder
from flallm_ds.command_help import Verb, VerbTable
from flallm_ds.errors import UserError, require

CHECKPOINTS = VerbTable(
    about="A checkpoint is the state from which a run resumes, on any number of ranks.",
    verbs={
        "ls": Verb("List the checkpoints of a run.", "flallm_ds.cli.checkpoints:ls"),
        "verify": Verb(
            "Read every byte of the checkpoints of a run, and compare checksums.",
            "flallm_ds.cli.checkpoints:verify",
        ),
        "prune": Verb(
            "Remove all but the newest checkpoints of a run.",
            "flallm_ds.cli.checkpoints:prune",
        ),
        "export": Verb(
            "Write the model of a checkpoint as an export, like best/ of the run.",
            "flallm_ds.cli.checkpoints:export",
        ),
    },
)


def ls(run: Path) -> None:
    """List the checkpoints of a run, oldest first: position, size and number of ranks.

    Example: flallm checkpoints ls runs/mine_llm
    """
    # Imports torch, which takes seconds.
    from flallm_ds.training.checkpoint import read_manifest

    for path in _folders(run):
        manifest = read_manifest(path)
        position = manifest.state["position"]
        gigabytes = sum(file.bytes for file in manifest.files) / 1e9
        ranks = {file.name.split(".")[0] for file in manifest.files}
        print(
            f"{path.name}  epoch {position['epoch']}  step {position['step']}  "
            f"{gigabytes:.3f} GB  {len(ranks)} ranks"
        )


def verify(run: Path) -> None:
    """Compare every byte of the checkpoints of a run with its checksum.

    The exit code is 2 if a checkpoint is damaged.

    Example: flallm checkpoints verify runs/mine_llm
    """
    # Imports torch, which takes seconds.
    from flallm_ds.training.checkpoint import read_manifest
    from flallm_ds.training.fragment_files import FragmentReader

    damaged = []
    for path in _folders(run):
        manifest = read_manifest(path)
        reader = FragmentReader(path, manifest.files)
        faults = []
        for file in manifest.files:
            fault = reader.verify(file)
            if fault is not None:
                faults.append(f"{file.name} {fault}")
        print(f"{path.name}: {', '.join(faults) or 'complete'}", flush=True)
        if faults:
            damaged.append(path.name)
    if damaged:
        raise UserError(
            f"Cannot resume from {', '.join(damaged)} of {run}: the files above were "
            "changed. A run resumes from its newest complete checkpoint."
        )


def prune(run: Path, keep: int = 1) -> None:
    """Remove all but the newest checkpoints of a run that is not in use.

    Example: flallm checkpoints prune runs/mine_llm --keep=1

    Options:
        keep: number of checkpoints that stay
    """
    require(keep >= 1, f"--keep must be at least 1, got {keep}.")
    folders = _folders(run)
    # Imports torch, which takes seconds.
    from flallm_ds.files import locked
    from flallm_ds.run_check import LOCK
    from flallm_ds.training.checkpoint import remove_old

    with locked(run / LOCK, f"Run folder {run}", "prune it later"):
        remove_old(run / "checkpoints", keep)
    for path in folders[:-keep]:
        print(f"removed {path.name}")


def export(run: Path, *, out: Path, step: int | None = None) -> None:
    """Write the model of a checkpoint to a folder like best/ of the run.

    One process reads the checkpoint, without DeepSpeed and on a CPU; it needs memory for the
    weights. Frozen weights are loaded from their source. With llm.tune=lora the folder
    needs its base model, as best/ does.

    Example: flallm checkpoints export runs/mine_llm --step=1200 --out=runs/mine_llm/at_1200

    Options:
        out: the folder to write
        step: of the checkpoint; the newest by default
    """
    check_new_folder("--out", out)
    by_step = folders_by_step(run)
    step = max(by_step) if step is None else step
    if step not in by_step:
        steps = ", ".join(map(str, by_step))
        raise UserError(
            f"--step must be that of a checkpoint of {run} ({steps}), got {step}."
        )
    write_export(run, [by_step[step]], out)
    print(f"{out} is ready.")


def write_export(run: Path, checkpoints: Sequence[Path], out: Path) -> None:
    """Write an export of a checkpoint, or of the mean of several, the newest last. Raises
    UserError."""
    # Imports torch, which takes seconds.
    from safetensors import SafetensorError

    from flallm_ds.training.exporting import export_checkpoints

    try:
        export_checkpoints(run, checkpoints, out)
    except SafetensorError as error:
        raise UserError(
            f"Cannot write {out}: {error}. Free some space and run the same command again."
        ) from error


def folders_by_step(run: Path) -> dict[int, Path]:
    """Return {step: checkpoint} of a run, oldest first. Raises UserError if it has none."""
    return {int(path.name.removeprefix("step-")): path for path in _folders(run)}


def _folders(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. Raises UserError if it has none."""
    found = sorted((run / "checkpoints").glob("step-*/manifest.json"))
    if not found:
        raise UserError(
            f"Cannot find a checkpoint in {run}: checkpoints/step-*/manifest.json does not "
            "exist. Give the folder of a run."
        )
    return [path.parent for path in found]
