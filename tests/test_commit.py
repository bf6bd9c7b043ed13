import subprocess
import sys

from flallm_ds.commit import REPOSITORY, commit_of, copy_code
from tests.helpers.paths import ROOT


def test_the_commit_is_that_of_the_checkout(tmp_path):
    """A repository around the checkout does not count."""
    repository = tmp_path / "outer"
    code = repository / "flallm_ds"
    code.mkdir(parents=True)
    (code / "file.py").touch()
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    commit, dirty = commit_of(repository)
    assert len(commit) == 40 and dirty is False
    (code / "new.py").touch()
    assert commit_of(repository) == (commit, True)
    assert commit_of(code) == (None, None)


def test_a_copy_of_the_code_runs_alone_and_knows_its_commit(tmp_path):
    """Also from the folder of the checkout, where `python -m` would find the checkout."""
    for _ in range(2):  # the second copy replaces the first
        copy_code(tmp_path / "code")
        (tmp_path / "code" / "flallm_ds" / "gone.py").touch()
    copy_code(tmp_path / "code")
    assert commit_of(tmp_path / "code") == commit_of(REPOSITORY)
    package = tmp_path / "code" / "flallm_ds"
    assert not (package / "gone.py").exists()
    assert [path for path in package.rglob("*") if path.is_symlink()] == []
    assert (package / "ds_configs" / "zero2.json").is_file()
    assert (package / "slurm" / "run.sh").is_file()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "flallm_ds", "train", "--help"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path / "code"), "PYTHONVERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(package / "cli" / "train.py") in done.stderr
    assert str(ROOT / "flallm_ds" / "cli") not in done.stderr
