"""Started under a launcher by `launching.run_scenarios`: trains each scenario of a JSON file in turn."""

import json
from pathlib import Path

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.recipes import resolve
from flallm_ds.training.build import build_task
from flallm_ds.training.run_folder import open_run_folder
from flallm_ds.training.stop import StopRequest
from flallm_ds.training.trainer import Trainer


def scenarios(*, file: Path) -> None:
    """file: a list of {"stage": …, "options": {…}}."""
    world = dist.start()
    stop = StopRequest()
    for scenario in json.loads(file.read_text(encoding="utf-8")):
        config = resolve(scenario["stage"], None, scenario["options"])
        folder = dist.main_first(lambda config=config: open_run_folder(config), world)
        Trainer(build_task(config, folder, world), folder, stop).run()
    dist.stop()


main(scenarios)
