"""A run: its stage, its folders and its sections; overrides, and reading config.json."""

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flallm_ds.command import check_not_empty, coerce, nearest
from flallm_ds.config.sections import (
    DataConfig,
    EvalConfig,
    LightTranslatorConfig,
    LlmConfig,
    OptimConfig,
    Stage,
    TrainConfig,
    VisualConfig,
)
from flallm_ds.errors import UserError, require


@dataclass(frozen=True)
class RunConfig:
    """One run of one stage."""

    stage: Stage
    # the run's folder: created if it does not exist, else resumed
    run: str
    # stage llm: the run folder of stage 1 (or its export), or "none" to do without
    visual_run: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    visual: VisualConfig = field(default_factory=VisualConfig)
    light_t: LightTranslatorConfig = field(default_factory=LightTranslatorConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require(
            self.stage != "llm" or bool(self.visual_run),
            "visual_run must name the run folder of stage visual in stage llm (or be "
            "none), but is empty. Give --visual_run=FOLDER.",
        )
        require(
            self.stage != "joint" or not self.visual_run,
            "visual_run must not be given in stage joint, which has no stage 1, but is "
            f"{self.visual_run}.",
        )
        require(
            self.stage == "llm" or self.visual.frozen == "all",
            f"visual.frozen is of stage llm and must not be given in stage {self.stage}, "
            f"but is {self.visual.frozen}.",
        )
        require(
            self.stage == "visual"
            or self.llm.input != "light_t"
            or self.visual_run not in ("", "none"),
            "llm.input must be signs or frames where there is no stage 1 whose Light-T "
            "could be read, but is light_t.",
        )

    @property
    def trains_visual(self) -> bool:
        """Whether a part of the visual encoder is trained, inside the engine."""
        return self.stage != "llm" or self.visual.frozen != "all"

    def with_overrides(self, overrides: Mapping[str, str]) -> "RunConfig":
        """A copy with dotted options set, e.g. {"optim.lr": "3e-4"}; strings are read by
        each field's type.

        Raises UserError that names the nearest options where one does not exist.
        """
        check_names(overrides)
        sections: dict[str, dict[str, Any]] = {"": {}}
        for name, value in overrides.items():
            section, _, option = name.rpartition(".")
            owner = type(getattr(self, section)) if section else type(self)
            hint = typing.get_type_hints(owner)[option]
            defaults = {f.name: f.default for f in dataclasses.fields(owner)}
            sections.setdefault(section, {})[option] = coerce(value, hint, name)
            check_not_empty(value, defaults[option], name)
        # All sections are replaced at once: `__post_init__` must not see half of the
        # changes.
        changed = sections.pop("")
        for section, values in sections.items():
            changed[section] = dataclasses.replace(getattr(self, section), **values)
        return dataclasses.replace(self, **changed)

    def options(self) -> dict[str, Any]:
        """Every option by its dotted name, with its value."""
        flat: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if dataclasses.is_dataclass(value):
                for g in dataclasses.fields(value):
                    flat[f"{f.name}.{g.name}"] = getattr(value, g.name)
            else:
                flat[f.name] = value
        return flat

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> "RunConfig":
        """Read what `to_json` wrote. Raises UserError where it is not JSON or a field is
        unknown."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} must be JSON, but {error}.") from error
        require(
            isinstance(saved, dict),
            f"{path} must be a JSON object, got {type(saved).__name__}.",
        )
        hints = typing.get_type_hints(cls)
        arguments: dict[str, Any] = {}
        for name, value in saved.items():
            hint = hints.get(name)
            if hint is None:
                raise UserError(
                    f"{path} has an unknown field {name!r}: it comes from another version."
                )
            if isinstance(value, dict):
                value = _section(hint, value, path)
            arguments[name] = value
        try:
            return cls(**arguments)
        except TypeError as error:
            raise UserError(
                f"{path} must hold the fields of a run, but does not: {error}."
            ) from error


def check_names(options: Iterable[str]) -> None:
    """Raise UserError that names the nearest options where one does not exist."""
    valid = RunConfig(stage="visual", run="").options()
    for name in options:
        if name not in valid:
            raise UserError(
                f"there is no option --{name}: {nearest(name, [*valid, 'recipe'])}"
            )


# What may differ between a run and its resumption without changing a number of it.
FREE_TO_CHANGE = (
    "run",
    "visual_run",
    "data.shards",  # a copy elsewhere; the fingerprint must be the same
    "data.threads",
    "data.max_broken",
    "data.check_shards",
    "data.cache_dir",
    "data.cache_gb",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.log_every_s",
    "train.max_steps",
    "train.probe_every",
    "eval.gather",
)


def _section(cls: Any, values: dict[str, Any], path: Path) -> Any:
    if cls is DataConfig:
        values = _without_pipe(values, path)
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = set(values) - names
    if unknown:
        raise UserError(
            f"{path} has an unknown field {unknown.pop()!r}: it comes from another version."
        )
    arguments = {}
    for name, value in values.items():
        arguments[name] = (
            tuple(value) if isinstance(value, list) else value
        )  # JSON has no tuples
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UserError(
            f"{path} must hold values of the fields' types, but does not: {error}."
        ) from error


def _without_pipe(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Leave out `allow_pipe`, a former option that older runs hold. Raises UserError if
    it is set."""
    require(
        values.get("allow_pipe", False) is False,
        "data.allow_pipe must be false, because shards are no longer read from commands, "
        f"got {values.get('allow_pipe')!r}: {path}. Copy the shards to a folder or give "
        "an https:// or s3:// address in data.shards, and set data.allow_pipe to false "
        "there.",
    )
    values = dict(values)
    values.pop("allow_pipe", None)
    return values
