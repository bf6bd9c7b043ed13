"""Test that both ranks raise an error at once if one of them cannot write its shards."""

import subprocess
import sys
from pathlib import Path

from flallm_ds.dist import World, free_port
from flallm_ds.training import checkpoint
from tests.helpers.launching import environment
from tests.helpers.paths import ROOT

SCRIPT = """
import resource, signal, sys
from datetime import timedelta
from pathlib import Path
import torch
from flallm_ds import dist
from flallm_ds.process import end_process
from flallm_ds.config import OptimConfig
from flallm_ds.errors import UserError
from flallm_ds.training import checkpoint, engine as ds
from flallm_ds.training.deepspeed_json import complete

world = dist.start(timeout=timedelta(seconds=60))
ds.prepare()
module = torch.nn.Linear(100, 1000)
config = complete(ds.read_deepspeed_config(Path("ds_configs/zero2.json")), world.device, 1, 1.0)
engine = ds.Engine(module, [{"params": list(module.parameters()), "lr": 0.1}], OptimConfig(), config, world)
folder = Path(sys.argv[1])

def save(step):
    checkpoint.Save(folder, step, {}, engine.fragments(), world, background=False).commit(2)

save(1)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if world.rank == 1:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
try:
    save(2)
except UserError as error:
    print(f"error: {error}", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
save(3)
dist.stop()
end_process(0)
"""


def start_rank(rank: int, port: int, folder: Path) -> subprocess.Popen[str]:
    """Start one of two ranks that run `SCRIPT`."""
    launcher = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT), **launcher},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_an_error_of_one_rank_is_raised_by_both_and_the_run_can_continue(
    tmp_path: Path,
) -> None:
    port = free_port()
    ranks = [start_rank(rank, port, tmp_path) for rank in range(2)]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert "error: Cannot write checkpoint" in output, output
        assert " (rank 1). Earlier" in output, output
    assert [p.name for p in checkpoint.committed(tmp_path)] == [
        "step-00000001",
        "step-00000003",
    ]
    alone = World(rank=0, size=1, local_rank=0, local_size=1)
    found = checkpoint.newest(tmp_path, alone)
    assert found is not None and found.path.name == "step-00000003" and not found.damaged
