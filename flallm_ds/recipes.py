"""Named configurations of runs (recipes), and their choice by a command line.

    flallm recipes
    deepspeed launch/train.py --recipe phoenix14t_visual --data.shards=FOLDER --optim.lr=5e-3
    deepspeed launch/train.py --recipe phoenix14t --stage both --run=runs/phoenix

A row is a base and the options that differ from it, written as on the command line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

from flallm_ds.command import check_not_empty, coerce, nearest
from flallm_ds.config import (
    DataConfig,
    EvalConfig,
    LightTranslatorConfig,
    LlmConfig,
    OptimConfig,
    RunConfig,
    Stage,
    TrainConfig,
    VisualConfig,
    check_names,
)
from flallm_ds.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """A named configuration.

    summary: one line. options: those that differ from the base; the run folder is
    runs/NAME. paper: test BLEU-4 of FLa-LLM (arXiv 2403.12556), or None. ours: our test
    BLEU-4 and its test set; empty if it is not measured.
    """

    summary: str
    base: RunConfig
    options: Mapping[str, str] = field(default_factory=dict)
    paper: float | None = None
    ours: str = ""


# signsim at 64 px, with a ResNet-18 of a quarter of the width: minutes on 2 CPU cores.
_QUICKSTART_VISUAL = RunConfig(
    stage="visual",
    run="",
    data=DataConfig(
        shards=("data/signsim/shards",),
        frame_size=64,
        crop_size=60,
        augment=False,
        batch_clips=16,
        micro_batches=2,
    ),
    visual=VisualConfig(
        weights="data/signsim/backbone",
        width=16,
        freeze_batch_norm=True,
        frozen_stages=3,
    ),
    light_t=LightTranslatorConfig(size="tiny", dropout=0.0),
    llm=LlmConfig(name="data/signsim/llm"),
    optim=OptimConfig(
        name="adamw",
        lr=1e-3,
        backbone_lr=2e-4,
        weight_decay=1e-2,
        warmup=0.05,
        betas=(0.9, 0.98),
    ),
    train=TrainConfig(epochs=8),
    eval=EvalConfig(every_epochs=4, num_beams=1, max_new_tokens=40),
)

# Under ZeRO-3, batches of 32 take a third less time than of 16 (docs/experiments.md).
_QUICKSTART_LLM = RunConfig(
    stage="llm",
    run="",
    visual_run="runs/quickstart_visual",
    data=replace(_QUICKSTART_VISUAL.data, batch_clips=32),
    visual=_QUICKSTART_VISUAL.visual,
    llm=LlmConfig(name="data/signsim/llm", dropout=0.0),
    optim=OptimConfig(name="adamw", lr=1e-3, llm_lr=5e-4, weight_decay=1e-2, warmup=0.05),
    train=TrainConfig(epochs=11),
    eval=EvalConfig(every_epochs=6, num_beams=1, max_new_tokens=40),
)


# A newcomer's own corpus: some hundred to some ten thousand clips on one GPU. Values without
# a comment are those of the paper for PHOENIX14T. The language is that of each clip.
_MINE_DATA = DataConfig(
    shards=("data/mine",),
    # The paper's pace (25 frames a second, one in four) for cameras of any frame rate.
    target_fps=6.25,
    batch_clips=8,
    micro_batches=2,  # 4 clips at a time, as on each of the paper's GPUs (24 GB)
)

_MINE_VISUAL = RunConfig(
    stage="visual",
    run="",
    data=_MINE_DATA,
    optim=OptimConfig(
        # A small corpus has few steps, in which AdamW gets further than the paper's SGD.
        # Light-T scored alike with 5e-4 and 1e-3, and did not learn with 2e-3
        # (docs/experiments.md).
        name="adamw",
        lr=5e-4,
        # A learning rate that suits new weights destroys pretrained ones (the same page).
        backbone_lr=1e-4,
        weight_decay=1e-2,  # decoupled in AdamW: 1e-3 changes little within some 1,000 steps
        warmup=0.05,  # AdamW's first steps are the largest
    ),
    train=TrainConfig(epochs=75),
    # Searching the dev split takes as long as an epoch of a small corpus; greedy search is
    # enough to choose an epoch, and flallm evaluate uses 5 beams.
    eval=EvalConfig(every_epochs=5, num_beams=1),
)

_MINE_LLM = RunConfig(
    stage="llm",
    run="",
    visual_run="runs/mine_visual",
    data=replace(_MINE_DATA, batch_clips=16),
    optim=OptimConfig(name="adamw", lr=1e-3, llm_lr=1e-5, weight_decay=1e-2, warmup=0.05),
    train=TrainConfig(epochs=40),
    eval=EvalConfig(every_epochs=5, num_beams=1),
)


def _paper_visual(corpus: str, language: str) -> RunConfig:
    """Return stage 1 as the paper trains it. language: mBART's token."""
    return RunConfig(
        stage="visual",
        run="",
        data=DataConfig(shards=(f"data/{corpus}",), batch_clips=8, micro_batches=2),
        llm=LlmConfig(language=language),
        optim=OptimConfig(name="sgd", lr=1e-2),
        train=TrainConfig(epochs=75),
    )


def _paper_llm(corpus: str, language: str) -> RunConfig:
    """Return stage 2 as the paper trains it. language: mBART's token."""
    return RunConfig(
        stage="llm",
        run="",
        visual_run=f"runs/{corpus}_visual",
        data=DataConfig(shards=(f"data/{corpus}",), batch_clips=16, micro_batches=2),
        llm=LlmConfig(language=language),
        optim=OptimConfig(name="adamw", lr=1e-3, llm_lr=1e-5),
        train=TrainConfig(epochs=40),
    )


_VISUAL = _paper_visual("phoenix14t", "de_DE")
_LLM = _paper_llm("phoenix14t", "de_DE")

# What `--recipe FAMILY --stage STAGE` can name, by its purpose.
FAMILIES = {
    "mine": "your own corpus, in data/mine or --data.shards=FOLDER; one GPU",
    "quickstart": "the synthetic corpus signsim: minutes on 2 CPU cores",
    "phoenix14t": "PHOENIX14T (German weather) as in the paper",
    "csl_daily": "CSL-Daily (Chinese) as in the paper",
    "how2sign": "How2Sign (English) as in the paper",
}

# Training clips of the paper's corpora, for plans of runs without their shards.
_TRAIN_CLIPS = {"phoenix14t": 7_096, "csl_daily": 18_401, "how2sign": 31_164}

RECIPES = {
    "mine_visual": Recipe("own corpus, stage 1: Light-T", _MINE_VISUAL),
    "mine_llm": Recipe("own corpus, stage 2 with mBART-large", _MINE_LLM),
    "quickstart_visual": Recipe(
        "signsim, stage 1: minutes on 2 cores",
        _QUICKSTART_VISUAL,
        ours="46.7 to 54.4 on signsim, 170 clips, seeds 0 to 2",
    ),
    "quickstart_llm": Recipe(
        "signsim, stage 2 with a stand-in LLM",
        _QUICKSTART_LLM,
        ours="62.0 to 63.4 on signsim, 170 clips, seeds 0 to 2",
    ),
    "quickstart_joint": Recipe(
        "signsim, no stages: encoder and LLM together",
        _QUICKSTART_LLM,
        {
            "stage": "joint",
            "visual_run": "",
            "data.batch_clips": "16",
            "optim.backbone_lr": "2e-4",
            "train.epochs": "19",  # as long as both stages
        },
        ours="73.2 on signsim, 170 clips, one seed",
    ),
    "phoenix14t_visual": Recipe("PHOENIX14T, stage 1: Light-T alone", _VISUAL, paper=17.69),
    "phoenix14t_llm": Recipe("PHOENIX14T, stage 2 with mBART-large", _LLM, paper=23.09),
    "csl_daily_visual": Recipe("CSL-Daily, stage 1", _paper_visual("csl_daily", "zh_CN")),
    "csl_daily_llm": Recipe(
        "CSL-Daily, stage 2 with mBART-large", _paper_llm("csl_daily", "zh_CN"), paper=14.20
    ),
    "how2sign_visual": Recipe("How2Sign, stage 1", _paper_visual("how2sign", "en_XX")),
    "how2sign_llm": Recipe(
        "How2Sign, stage 2 with mBART-large",
        _paper_llm("how2sign", "en_XX"),
        paper=9.66,
    ),
    # --- ablations of the paper, on PHOENIX14T; each differs from the paper's run in the
    # options that its row names
    # The paper states neither epochs nor learning rates of joint training. Epochs are those of
    # stage 1, learning rates those of stage 2; the encoder has that of the adapter.
    "phoenix14t_joint": Recipe(
        "Table 4: no stages, encoder and LLM together",
        _LLM,
        {"stage": "joint", "visual_run": "", "train.epochs": "75"},
        paper=12.90,
    ),
    # Frame-wise features: the local temporal module would have random weights.
    "phoenix14t_imagenet_llm": Recipe(
        "Table 5: stage 2 alone, frozen ImageNet features",
        _LLM,
        {"visual_run": "none", "llm.input": "frames"},
        paper=5.62,
    ),
    "phoenix14t_keep1_visual": Recipe(
        "Table 6, stage 1: all frames",
        _VISUAL,
        {"data.keep_every": "1"},
    ),
    "phoenix14t_keep1_llm": Recipe(
        "Table 6: all frames",
        _LLM,
        {"data.keep_every": "1", "visual_run": "runs/phoenix14t_keep1_visual"},
        paper=22.96,
    ),
    "phoenix14t_keep2_visual": Recipe(
        "Table 6, stage 1: every other frame", _VISUAL, {"data.keep_every": "2"}
    ),
    "phoenix14t_keep2_llm": Recipe(
        "Table 6: every other frame",
        _LLM,
        {"data.keep_every": "2", "visual_run": "runs/phoenix14t_keep2_visual"},
        paper=23.04,
    ),
    "phoenix14t_keep8_visual": Recipe(
        "Table 6, stage 1: one frame in eight", _VISUAL, {"data.keep_every": "8"}
    ),
    "phoenix14t_keep8_llm": Recipe(
        "Table 6: one frame in eight",
        _LLM,
        {"data.keep_every": "8", "visual_run": "runs/phoenix14t_keep8_visual"},
        paper=20.02,
    ),
    "phoenix14t_tiny_visual": Recipe(
        "Table 7, stage 1: Light-T tiny",
        _VISUAL,
        {"light_t.size": "tiny"},
    ),
    "phoenix14t_tiny_llm": Recipe(
        "Table 7: after a stage 1 with Light-T tiny",
        _LLM,
        {"visual_run": "runs/phoenix14t_tiny_visual"},
        paper=22.52,
    ),
    "phoenix14t_small_visual": Recipe(
        "Table 7, stage 1: Light-T small",
        _VISUAL,
        {"light_t.size": "small"},
    ),
    "phoenix14t_small_llm": Recipe(
        "Table 7: after a stage 1 with Light-T small",
        _LLM,
        {"visual_run": "runs/phoenix14t_small_visual"},
        paper=22.36,
    ),
    "phoenix14t_large_visual": Recipe(
        "Table 7, stage 1: Light-T large",
        _VISUAL,
        {"light_t.size": "large"},
    ),
    "phoenix14t_large_llm": Recipe(
        "Table 7: after a stage 1 with Light-T large",
        _LLM,
        {"visual_run": "runs/phoenix14t_large_visual"},
        paper=22.49,
    ),
    "phoenix14t_frames_llm": Recipe(
        "Table 8: the LLM reads frame-wise features",
        _LLM,
        {"llm.input": "frames"},
        paper=20.30,
    ),
    "phoenix14t_light_t_llm": Recipe(
        "Table 8: the LLM reads the states of Light-T's encoder",
        _LLM,
        {"llm.input": "light_t"},
        paper=22.60,
    ),
    "phoenix14t_unfrozen_llm": Recipe(
        "Table 9: the whole visual encoder trained in stage 2",
        _LLM,
        {"visual.frozen": "none"},
        paper=17.86,
    ),
    "phoenix14t_temporal_llm": Recipe(
        "Table 9: the temporal module trained in stage 2",
        _LLM,
        {"visual.frozen": "backbone"},
        paper=20.40,
    ),
    "phoenix14t_random_llm": Recipe(
        "Table 10: mBART-large without pretraining",
        _LLM,
        {"llm.pretrained": "false"},
        paper=16.19,
    ),
    "phoenix14t_mt5_llm": Recipe(
        "Table 10: mT5-base",
        _LLM,
        {"llm.name": "google/mt5-base", "llm.language": "de"},
        paper=19.71,
    ),
    "phoenix14t_mt5_random_llm": Recipe(
        "Table 10: mT5-base without pretraining",
        _LLM,
        {"llm.name": "google/mt5-base", "llm.language": "de", "llm.pretrained": "false"},
        paper=7.39,
    ),
}


def config_of(name: str) -> RunConfig:
    """Return the complete config of a row of `RECIPES`."""
    recipe = RECIPES[name]
    return recipe.base.with_overrides({"run": f"runs/{name}", **recipe.options})


def family_of(name: str) -> str:
    """Return the family of a row: the longest one that its name begins with."""
    families = [family for family in FAMILIES if name.startswith(f"{family}_")]
    return max(families, key=len)


def train_clips(recipe: str) -> int:
    """Return the training clips of a recipe's corpus: PHOENIX14T's if it is not known."""
    family = recipe if recipe in FAMILIES else family_of(recipe)
    return _TRAIN_CLIPS.get(family, _TRAIN_CLIPS["phoenix14t"])


def is_ablation(name: str) -> bool:
    """Return whether a row is an ablation; its summary names the paper's table."""
    return RECIPES[name].summary.startswith("Table ")


def resolve_both(
    recipe: str | None, overrides: Mapping[str, str]
) -> tuple[RunConfig, RunConfig]:
    """Return the configs of `--stage both`.

    Options apply to both stages, stage1.OPTION and stage2.OPTION to one. run=RUN means the
    folders RUN_visual and RUN_llm. Raises UserError as `resolve` does, and for options
    that would separate the stages.
    """
    visual, llm = options_of_both(recipe, overrides)
    return resolve("visual", recipe, visual), resolve("llm", recipe, llm)


def options_of_both(
    recipe: str | None, overrides: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the options of each stage of `--stage both`, as commands of their own have them.

    Raises UserError as `resolve_both` does.
    """
    # Sort the options by the stage that they apply to; "" is both.
    given: dict[str, dict[str, str]] = {"": {}, "stage1": {}, "stage2": {}}
    for name, value in overrides.items():
        stage, dot, option = name.partition(".")
        if dot and stage in given:
            given[stage][option] = value
        else:
            given[""][name] = value
    for stage, values in given.items():
        check_names(values)
        _check_joined(values, ("visual_run", "run") if stage else ("visual_run",))
    run = given[""].pop("run", None)
    visual, llm = given[""] | given["stage1"], given[""] | given["stage2"]
    if run is not None:
        run = coerce(run, str, "run")
        check_not_empty(run, None, "run")
        visual["run"], llm["run"] = f"{run}_visual", f"{run}_llm"
    visual["run"] = resolve("visual", recipe, visual).run
    llm["visual_run"] = visual["run"]
    return visual, llm


def _check_joined(values: Mapping[str, str], refused: tuple[str, ...]) -> None:
    """Raise UserError for folders by which stage 2 would not start from stage 1."""
    for option in refused:
        if option in values:
            raise UserError(
                f"--{option} must not be given for one stage of --stage both, because stage "
                f"2 starts from stage 1, got {values[option]!r}. Give --run=RUN for the "
                "folders RUN_visual and RUN_llm."
            )


def resolve(
    stage: str | None, recipe: str | None, overrides: Mapping[str, str]
) -> RunConfig:
    """Return the recipe's config with dotted overrides.

    `--recipe phoenix14t --stage llm` means phoenix14t_llm; the default recipe is
    quickstart. Raises UserError for an unknown option, recipe or stage, or where stage
    and recipe disagree.
    """
    check_names(overrides)
    if stage not in (None, *get_args(Stage)):
        raise UserError(f"--stage must be visual, llm, joint or both, got {stage!r}.")
    if stage is None and recipe is None:
        raise UserError(
            "--stage must be given, got nothing. Train --stage visual, then --stage llm, or "
            "--stage both."
        )
    # A family and a stage together name a row: phoenix14t and llm are phoenix14t_llm.
    name = recipe or "quickstart"
    if name not in RECIPES and stage is not None:
        name = f"{name}_{stage}"
    if name not in RECIPES:
        raise UserError(_unknown_recipe(recipe or "", stage))
    config = config_of(name)
    if stage is not None and config.stage != stage:
        raise UserError(
            f"--stage must be {config.stage} for the recipe {name}, got {stage}."
        )
    return config.with_overrides(overrides)


def _unknown_recipe(recipe: str, stage: str | None) -> str:
    """Return the error for a recipe that does not exist, or not for this stage."""
    if stage is None and recipe in FAMILIES:
        return f"--stage must be given for the recipe {recipe}, got nothing. Add --stage visual."
    return (
        f"--recipe must be one of flallm recipes, got {recipe!r}; "
        f"{nearest(recipe, RECIPES)}"
    )
