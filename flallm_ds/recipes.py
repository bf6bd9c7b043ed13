"""One function for each run worth naming; it returns a complete RunConfig.

    deepspeed launch/train.py --recipe phoenix14t_visual --data.shards=FOLDER --optim.lr=5e-3

A docstring gives the paper's figure (FLa-LLM, arXiv 2403.12556; test BLEU-4) beside ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import get_args

from flallm_ds.command import nearest
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


def quickstart_visual() -> RunConfig:
    """The embedded default, stage 1: signsim at 64 px, a ResNet-18 a quarter as wide, minutes on 2 cores."""
    return RunConfig(
        stage="visual",
        run="runs/quickstart_visual",
        data=DataConfig(
            shards=("data/signsim/shards",),
            frame_size=64,
            crop_size=60,
            augment=False,
            batch_clips=16,
            micro_batches=2,
        ),
        visual=VisualConfig(
            weights="data/signsim/backbone", width=16, freeze_batch_norm=True, frozen_stages=3
        ),
        light_t=LightTranslatorConfig(size="tiny", dropout=0.0),
        llm=LlmConfig(name="data/signsim/llm"),
        optim=OptimConfig(
            name="adamw", lr=1e-3, backbone_lr=2e-4, weight_decay=1e-2, warmup=0.05, betas=(0.9, 0.98)
        ),
        train=TrainConfig(epochs=8),
        eval=EvalConfig(every_epochs=4, num_beams=1, max_new_tokens=40),
    )


def quickstart_llm() -> RunConfig:
    """The embedded default, stage 2: the stand-in LLM that `flallm standin_llm` made."""
    base = quickstart_visual()
    return RunConfig(
        stage="llm",
        run="runs/quickstart_llm",
        visual_run="runs/quickstart_visual",
        data=replace(base.data, batch_clips=32),
        visual=base.visual,
        llm=LlmConfig(name="data/signsim/llm", dropout=0.0),
        optim=OptimConfig(name="adamw", lr=1e-3, llm_lr=5e-4, weight_decay=1e-2, warmup=0.05),
        train=TrainConfig(epochs=11),
        eval=EvalConfig(every_epochs=6, num_beams=1, max_new_tokens=40),
    )


def quickstart_joint() -> RunConfig:
    """The embedded default without stages: encoder and LLM trained together, as long as both stages."""
    visual, llm = quickstart_visual(), quickstart_llm()
    return replace(
        llm,
        stage="joint",
        run="runs/quickstart_joint",
        visual_run="",
        data=visual.data,
        optim=replace(llm.optim, backbone_lr=visual.optim.backbone_lr),
        train=replace(llm.train, epochs=visual.train.epochs + llm.train.epochs),
    )


def _paper_visual(corpus: str, language: str) -> RunConfig:
    return RunConfig(
        stage="visual",
        run=f"runs/{corpus}_visual",
        data=DataConfig(shards=(f"data/{corpus}",), batch_clips=8, micro_batches=2),
        llm=LlmConfig(language=language),
        optim=OptimConfig(name="sgd", lr=1e-2),
        train=TrainConfig(epochs=75),
    )


def _paper_llm(corpus: str, language: str) -> RunConfig:
    return RunConfig(
        stage="llm",
        run=f"runs/{corpus}_llm",
        visual_run=f"runs/{corpus}_visual",
        data=DataConfig(shards=(f"data/{corpus}",), batch_clips=16, micro_batches=2),
        llm=LlmConfig(language=language),
        optim=OptimConfig(name="adamw", lr=1e-3, llm_lr=1e-5),
        train=TrainConfig(epochs=40),
    )


def phoenix14t_visual() -> RunConfig:
    """PHOENIX14T, stage 1. Paper: 17.69 from Light-T alone; ours: not measured."""
    return _paper_visual("phoenix14t", "de_DE")


def phoenix14t_llm() -> RunConfig:
    """PHOENIX14T, stage 2 with mBART-large. Paper: 23.09; ours: not measured."""
    return _paper_llm("phoenix14t", "de_DE")


def csl_daily_visual() -> RunConfig:
    """CSL-Daily, stage 1. Paper: not given; ours: not measured."""
    return _paper_visual("csl_daily", "zh_CN")


def csl_daily_llm() -> RunConfig:
    """CSL-Daily, stage 2 with mBART-large. Paper: 14.20; ours: not measured."""
    return _paper_llm("csl_daily", "zh_CN")


def how2sign_visual() -> RunConfig:
    """How2Sign, stage 1. Paper: not given; ours: not measured."""
    return _paper_visual("how2sign", "en_XX")


def how2sign_llm() -> RunConfig:
    """How2Sign, stage 2 with mBART-large. Paper: 9.66; ours: not measured."""
    return _paper_llm("how2sign", "en_XX")


RECIPES: dict[str, Callable[[], RunConfig]] = {
    f.__name__: f
    for f in (
        quickstart_visual,
        quickstart_llm,
        quickstart_joint,
        phoenix14t_visual,
        phoenix14t_llm,
        csl_daily_visual,
        csl_daily_llm,
        how2sign_visual,
        how2sign_llm,
    )
}


def resolve(stage: str | None, recipe: str | None, overrides: Mapping[str, str]) -> RunConfig:
    """The recipe's config with dotted overrides.

    `--recipe phoenix14t --stage llm` means phoenix14t_llm; without a recipe it is the quickstart's.
    Raises UserError for an unknown option, recipe or stage, or where stage and recipe disagree.
    """
    check_names(overrides)
    if stage not in (None, *get_args(Stage)):
        raise UserError(f"--stage must be visual, llm, joint or both, but is {stage!r}.")
    if stage is None and recipe is None:
        raise UserError("--stage must be given: --stage visual first, then --stage llm.")
    name = recipe or "quickstart"
    if name not in RECIPES and stage is not None:
        name = f"{name}_{stage}"
    if name not in RECIPES:
        raise UserError(f"there is no recipe {recipe!r}: {nearest(recipe or '', RECIPES)}")
    config = RECIPES[name]()
    if stage is not None and config.stage != stage:
        raise UserError(f"--stage must be {config.stage} for the recipe {name}, but is {stage}.")
    return config.with_overrides(overrides)
