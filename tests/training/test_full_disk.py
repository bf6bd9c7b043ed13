"""One rank of two cannot write its shards: all must hear of it, at once."""

import subprocess
import sys
from pathlib import Path

from flallm_ds.dist import free_port
from flallm_ds.training import checkpoint
from tests.helpers.launching import environment
from tests.helpers.paths import ROOT

SCRIPT = """
import resource, signal, sys
from datetime import timedelta
from pathlib import Path
import torch
from flallm_ds import dist
from flallm_ds.command import end_process
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
checkpoint.save(folder, 1, {}, engine.save, world, 2)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if world.rank == 1:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
try:
    checkpoint.save(folder, 2, {}, engine.save, world, 2)
except UserError as error:
    print(f"heard: {error}", flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
checkpoint.save(folder, 3, {}, engine.save, world, 2)
dist.stop()
end_process(0)
"""


def test_a_rank_that_cannot_write_tells_the_others_and_the_run_can_go_on(
    tmp_path: Path,
) -> None:
    port = str(free_port())
    places = [
        {
            "RANK": str(r),
            "LOCAL_RANK": str(r),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for r in range(2)
    ]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            cwd=ROOT,
            env={**environment(), "PYTHONPATH": str(ROOT), **place},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for place in places
    ]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert "heard: the checkpoint" in output and "(rank 1: " in output, output
    assert [p.name for p in checkpoint.committed(tmp_path)] == [
        "step-00000001",
        "step-00000003",
    ]
    for path in checkpoint.committed(tmp_path):
        checkpoint.read_state(path)
