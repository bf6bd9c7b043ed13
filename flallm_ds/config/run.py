"""Define `RunConfig`, the configuration of a run: options, overrides and config.json."""

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flallm_ds.command import UnknownOption, check_not_empty, coerce
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
    """Configuration of one run of one stage."""

    # The part of the method that is trained.
    stage: Stage
    # Run folder. It is created if it does not exist, else the run is resumed.
    run: str
    # Stage llm: the run folder of stage 1 or its export, or "none" for no stage 1.
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
            "visual_run must be the run folder of stage visual (or none) in stage llm, got "
            "''. Give --visual_run=FOLDER.",
        )
        require(
            self.stage != "joint" or not self.visual_run,
            "visual_run must be empty in stage joint, which has no stage 1, got "
            f"{self.visual_run!r}. Leave --visual_run out.",
        )
        require(
            self.stage == "llm" or self.visual.frozen == "all",
            f"visual.frozen must be all in stage {self.stage}, got {self.visual.frozen}. "
            "Only stage llm can freeze other parts.",
        )
        require(
            self.stage == "visual"
            or self.llm.input != "light_t"
            or self.visual_run not in ("", "none"),
            "llm.input must be signs or frames if no stage 1 provides a Light-T, got "
            "light_t.",
        )
        self._check_patience()

    def _check_patience(self) -> None:
        """Raise UserError for a train.patience that no run of these epochs can exceed."""
        train, every = self.train, self.eval.every_epochs
        num_scorings = -(-train.epochs // every)
        # The first scoring is the best so far; to end at the last one saves nothing.
        most = max(0, num_scorings - 2)
        require(
            train.patience <= most,
            f"train.patience must be at most {most} if the dev split is scored "
            f"{num_scorings} times (train.epochs={train.epochs}, eval.every_epochs={every}),"
            f" got {train.patience}. A higher value could not end the run earlier; it "
            "counts scorings, not epochs.",
        )

    @property
    def trains_visual(self) -> bool:
        """Return whether a part of the visual encoder is trained in the engine."""
        return self.stage != "llm" or self.visual.frozen != "all"

    def with_overrides(self, overrides: Mapping[str, str]) -> "RunConfig":
        """Return a copy with options changed, e.g. {"optim.lr": "3e-4"}.

        Values are parsed by the types of the fields. Raises UserError for an unknown
        option, with the most similar names.
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
        # Replace all sections at once, because `__post_init__` checks options of several
        # sections together.
        changed = sections.pop("")
        for section, values in sections.items():
            changed[section] = dataclasses.replace(getattr(self, section), **values)
        return dataclasses.replace(self, **changed)

    def options(self) -> dict[str, Any]:
        """Return {dotted name of an option: its value}, for all options."""
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
        """Return the content of config.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> "RunConfig":
        """Read a config.json. Raises UserError if it is not JSON or a field is unknown."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"Cannot read {path}: it is not JSON ({error}).") from error
        require(
            isinstance(saved, dict),
            f"{path} must be a JSON object, got {type(saved).__name__}.",
        )
        hints = typing.get_type_hints(cls)
        arguments: dict[str, Any] = {}
        for name, value in saved.items():
            hint = hints.get(name)
            if hint is None:
                raise _unknown_field(name, path)
            if isinstance(value, dict):
                value = _section(hint, value, path)
            arguments[name] = value
        try:
            return cls(**arguments)
        except TypeError as error:
            raise _wrong_type(error, path) from error


def check_names(options: Iterable[str]) -> None:
    """Raise UnknownOption for an unknown option, with the most similar names."""
    valid = RunConfig(stage="visual", run="").options()
    for name in options:
        if name not in valid:
            raise UnknownOption(name, valid)


# Options that may change when a run is resumed, because they do not change its results.
FREE_TO_CHANGE = (
    "run",
    "visual_run",
    "data.shards",  # another copy of the same shards: the fingerprint is compared
    "data.threads",
    "data.max_broken",
    "data.same_clips",
    "data.check_shards",
    "data.cache_dir",
    "data.cache_gb",
    "train.deepspeed",
    # When the run ends, as train.max_steps: the steps until then are the same.
    "train.patience",
    "train.save_every_steps",
    "train.save_every_minutes",
    "train.stall_warn_s",
    "train.stall_limit_s",
    "train.keep_checkpoints",
    "train.log_every_s",
    "train.max_steps",
    "train.probe_every",
    "train.trackers",
    "train.profile",
    "eval.gather",
)


def _section(cls: Any, values: dict[str, Any], path: Path) -> Any:
    """Make a section of class `cls` from its object in config.json."""
    if cls is DataConfig:
        values = _without_pipe(values, path)
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = set(values) - names
    if unknown:
        raise _unknown_field(unknown.pop(), path)
    arguments = {}
    for name, value in values.items():
        arguments[name] = (
            tuple(value) if isinstance(value, list) else value
        )  # JSON has no tuples
    try:
        return cls(**arguments)
    except TypeError as error:
        raise _wrong_type(error, path) from error


def _wrong_type(error: TypeError, path: Path) -> UserError:
    return UserError(
        f"Cannot read {path}: a field is missing or its value has the wrong type ({error})."
    )


def _unknown_field(name: str, path: Path) -> UserError:
    return UserError(
        f"Cannot read {path}: unknown field {name!r}. The file was written by another version."
    )


def _without_pipe(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Remove `allow_pipe`, an option of older versions. Raises UserError if it is set."""
    require(
        values.get("allow_pipe", False) is False,
        f"data.allow_pipe in {path} must be false, because shards are no longer read from "
        f"commands, got {values.get('allow_pipe')!r}. Copy the shards to a folder or give an "
        "https:// or s3:// address in data.shards, and set data.allow_pipe to false.",
    )
    values = dict(values)
    values.pop("allow_pipe", None)
    return values
