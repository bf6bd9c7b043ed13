"""One function for each run worth naming; it returns a complete RunConfig.

    deepspeed launch/train.py --recipe phoenix14t_visual --data.shards=FOLDER --optim.lr=5e-3
    deepspeed launch/train.py --recipe phoenix14t --stage both --run=runs/mine --stage2.optim.llm_lr=2e-5

A docstring gives the paper's figure (FLa-LLM, arXiv 2403.12556; test BLEU-4) beside ours. Recipes of the
ablations differ from phoenix14t_visual and phoenix14t_llm in what their docstring names alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

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


# --- ablations of the paper, on PHOENIX14T


def phoenix14t_joint() -> RunConfig:
    """Table 4, no stages: encoder with ImageNet weights and LLM together. Paper: 12.90; ours: not measured.

    As many epochs as stage 1; the rates of stage 2, the encoder's as the adapter's (the paper names none).
    """
    return replace(
        phoenix14t_llm(),
        stage="joint",
        run="runs/phoenix14t_joint",
        visual_run="",
        train=TrainConfig(epochs=75),
    )


def phoenix14t_imagenet_llm() -> RunConfig:
    """Table 5, stage 2 alone on frozen ImageNet features. Paper: 5.62; ours: not measured.

    Frame-wise, since the local temporal module would have random weights. Stage 1 alone is the score of
    phoenix14t_visual: 17.69.
    """
    return _llm_ablation("imagenet", visual_run="none", llm={"input": "frames"})


def phoenix14t_keep1_visual() -> RunConfig:
    """Table 6, all frames, stage 1. Paper: 22.96 after stage 2; ours: not measured."""
    return _visual_ablation("keep1", data={"keep_every": 1})


def phoenix14t_keep1_llm() -> RunConfig:
    """Table 6, all frames. Paper: 22.96; ours: not measured."""
    return _llm_ablation("keep1", visual_run="runs/phoenix14t_keep1_visual", data={"keep_every": 1})


def phoenix14t_keep2_visual() -> RunConfig:
    """Table 6, every other frame, stage 1. Paper: 23.04 after stage 2; ours: not measured."""
    return _visual_ablation("keep2", data={"keep_every": 2})


def phoenix14t_keep2_llm() -> RunConfig:
    """Table 6, every other frame. Paper: 23.04; ours: not measured. One frame in four: phoenix14t_llm."""
    return _llm_ablation("keep2", visual_run="runs/phoenix14t_keep2_visual", data={"keep_every": 2})


def phoenix14t_keep8_visual() -> RunConfig:
    """Table 6, one frame in eight, stage 1. Paper: 20.02 after stage 2; ours: not measured."""
    return _visual_ablation("keep8", data={"keep_every": 8})


def phoenix14t_keep8_llm() -> RunConfig:
    """Table 6, one frame in eight. Paper: 20.02; ours: not measured."""
    return _llm_ablation("keep8", visual_run="runs/phoenix14t_keep8_visual", data={"keep_every": 8})


def phoenix14t_tiny_visual() -> RunConfig:
    """Table 7, Light-T tiny, stage 1. Paper: 22.52 after stage 2; ours: not measured."""
    return _visual_ablation("tiny", light_t={"size": "tiny"})


def phoenix14t_tiny_llm() -> RunConfig:
    """Table 7, after a stage 1 with Light-T tiny. Paper: 22.52; ours: not measured."""
    return _llm_ablation("tiny", visual_run="runs/phoenix14t_tiny_visual")


def phoenix14t_small_visual() -> RunConfig:
    """Table 7, Light-T small, stage 1. Paper: 22.36 after stage 2; ours: not measured."""
    return _visual_ablation("small", light_t={"size": "small"})


def phoenix14t_small_llm() -> RunConfig:
    """Table 7, after a stage 1 with Light-T small. Paper: 22.36; ours: not measured."""
    return _llm_ablation("small", visual_run="runs/phoenix14t_small_visual")


def phoenix14t_large_visual() -> RunConfig:
    """Table 7, Light-T large, stage 1. Paper: 22.49 after stage 2; ours: not measured."""
    return _visual_ablation("large", light_t={"size": "large"})


def phoenix14t_large_llm() -> RunConfig:
    """Table 7, after a stage 1 with Light-T large. Paper: 22.49; ours: not measured."""
    return _llm_ablation("large", visual_run="runs/phoenix14t_large_visual")


def phoenix14t_frames_llm() -> RunConfig:
    """Table 8, the LLM reads frame-wise features. Paper: 20.30; ours: not measured."""
    return _llm_ablation("frames", llm={"input": "frames"})


def phoenix14t_light_t_llm() -> RunConfig:
    """Table 8, the LLM reads the states of Light-T's encoder. Paper: 22.60; ours: not measured."""
    return _llm_ablation("light_t", llm={"input": "light_t"})


def phoenix14t_unfrozen_llm() -> RunConfig:
    """Table 9, the whole visual encoder is trained on in stage 2. Paper: 17.86; ours: not measured."""
    return _llm_ablation("unfrozen", visual={"frozen": "none"})


def phoenix14t_temporal_llm() -> RunConfig:
    """Table 9, backbone frozen, temporal module trained in stage 2. Paper: 20.40; ours: not measured."""
    return _llm_ablation("temporal", visual={"frozen": "backbone"})


def phoenix14t_random_llm() -> RunConfig:
    """Table 10, mBART-large without pretraining. Paper: 16.19; ours: not measured."""
    return _llm_ablation("random", llm={"pretrained": False})


def phoenix14t_mt5_llm() -> RunConfig:
    """Table 10, mT5-base. Paper: 19.71; ours: not measured."""
    return _llm_ablation("mt5", llm={"name": "google/mt5-base", "language": "de"})


def phoenix14t_mt5_random_llm() -> RunConfig:
    """Table 10, mT5-base without pretraining. Paper: 7.39; ours: not measured."""
    return _llm_ablation("mt5_random", llm={"name": "google/mt5-base", "language": "de", "pretrained": False})


def _visual_ablation(name: str, **sections: dict[str, Any]) -> RunConfig:
    return _changed(replace(phoenix14t_visual(), run=f"runs/phoenix14t_{name}_visual"), sections)


def _llm_ablation(
    name: str, visual_run: str = "runs/phoenix14t_visual", **sections: dict[str, Any]
) -> RunConfig:
    config = replace(phoenix14t_llm(), run=f"runs/phoenix14t_{name}_llm", visual_run=visual_run)
    return _changed(config, sections)


def _changed(config: RunConfig, sections: Mapping[str, dict[str, Any]]) -> RunConfig:
    return replace(config, **{s: replace(getattr(config, s), **values) for s, values in sections.items()})


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
        phoenix14t_joint,
        phoenix14t_imagenet_llm,
        phoenix14t_keep1_visual,
        phoenix14t_keep1_llm,
        phoenix14t_keep2_visual,
        phoenix14t_keep2_llm,
        phoenix14t_keep8_visual,
        phoenix14t_keep8_llm,
        phoenix14t_tiny_visual,
        phoenix14t_tiny_llm,
        phoenix14t_small_visual,
        phoenix14t_small_llm,
        phoenix14t_large_visual,
        phoenix14t_large_llm,
        phoenix14t_frames_llm,
        phoenix14t_light_t_llm,
        phoenix14t_unfrozen_llm,
        phoenix14t_temporal_llm,
        phoenix14t_random_llm,
        phoenix14t_mt5_llm,
        phoenix14t_mt5_random_llm,
    )
}


def resolve_both(recipe: str | None, overrides: Mapping[str, str]) -> tuple[RunConfig, RunConfig]:
    """The configs of `--stage both`.

    Options go to both stages, stage1.OPTION and stage2.OPTION to one. run=RUN means the folders RUN_visual
    and RUN_llm. Raises UserError as `resolve` does, and for what would part the stages.
    """
    given: dict[str, dict[str, str]] = {"": {}, "stage1": {}, "stage2": {}}
    for name, value in overrides.items():
        stage, dot, option = name.partition(".")
        of_one = dot and stage in given
        given[stage if of_one else ""][option if of_one else name] = value
    for name, values in given.items():
        check_names(values)
        for option in ("visual_run", "run") if name else ("visual_run",):
            if option in values:
                raise UserError(
                    f"--{option} must not be given for one stage of --stage both, but is {values[option]!r}: "
                    "stage 2 starts from stage 1. Give --run=RUN for the folders RUN_visual and RUN_llm."
                )
    run = given[""].pop("run", None)
    if run is not None:
        run = coerce(run, str, "run")
        check_not_empty(run, None, "run")
    visual = resolve("visual", recipe, given[""] | given["stage1"])
    llm = resolve("llm", recipe, given[""] | given["stage2"])
    if run is not None:
        visual, llm = replace(visual, run=f"{run}_visual"), replace(llm, run=f"{run}_llm")
    return visual, replace(llm, visual_run=visual.run)


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
