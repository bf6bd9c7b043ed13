"""The model card of an export: what it is, how it was trained, how well it does; from
what is recorded."""

import json
import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

from flallm_ds.config import FREE_TO_CHANGE, RunConfig
from flallm_ds.data.index import Index
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.languages import find_language, tag_of
from flallm_ds.metrics.ceiling import is_low
from flallm_ds.metrics.columns import CEILING, COLUMNS, SIGNATURES, has_scores
from flallm_ds.recipes import RECIPES, config_of

PACKAGES = ("flallm_ds", "torch", "transformers", "deepspeed")


def training_facts(config: RunConfig, index: Index) -> dict[str, Any]:
    """How a model was trained, as plain values. index: of the training clips.

    Folders of this machine are left out of absolute paths: a card is made to be shown.
    """
    llm = None if config.stage == "visual" else config.llm.name
    return {
        "command": command(config),
        "llm": _without_folders(llm),
        "llm_is_of_a_hub": llm is not None and not Path(llm).exists(),
        "tune": None if config.stage == "visual" else config.llm.tune,
        "corpora": list(index.corpora) or [index.corpus],
        "num_clips": len(index),
        "epochs": config.train.epochs,
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def command(config: RunConfig) -> str:
    """Return the training command by the nearest recipe, with the shards and all options
    that change numbers.

    An absolute path becomes /path/to/ and its last part.
    """

    of_stage = [name for name in RECIPES if config_of(name).stage == config.stage]
    differences = {}
    for name in of_stage or RECIPES:
        differences[name] = _differences(config, config_of(name))

    nearest = min(differences, key=lambda name: len(differences[name]))
    words = ["deepspeed", "launch/train.py", f"--recipe={nearest}"]
    for option, value in differences[nearest].items():
        words.append(f"--{option}={_flag(value)}")
    return " ".join(map(_quoted, words))


def _differences(config: RunConfig, recipe: RunConfig) -> dict[str, Any]:
    """Return the options of `config` that change numbers and that `recipe` sets otherwise."""
    # Free to change for a resumed run, but another visual run or other shards change every
    # number of a new one.
    free = set(FREE_TO_CHANGE) - {"visual_run", "data.shards"}
    base = recipe.options()
    differences = {}
    for option, value in config.options().items():
        if option not in free and value != base[option]:
            differences[option] = value
    return differences


def _quoted(word: str) -> str:
    """Return a word for bash; one with line breaks or control characters as $'...', so
    that it shows."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = ""
    for character in word.replace("\\", r"\\").replace("'", r"\'"):
        shows = character.isprintable()
        escaped += character if shows else character.encode("unicode_escape").decode()
    return f"$'{escaped}'"


def _flag(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_flag, value))
    if isinstance(value, str) and value.startswith("/"):
        return f"/path/to/{Path(value).name}"
    return str(value)


def _without_folders(value: str | None) -> str | None:
    return Path(value).name if value is not None and value.startswith("/") else value


def plain(text: str) -> str:
    """Return text from a corpus or a config as Markdown shows it: no markup, no HTML, one
    line."""
    visible = ""
    for character in text:
        visible += character if character.isprintable() else " "
    return re.sub(r"([\\`*_\[\]<>&|#])", r"\\\1", visible)


def _code_block(text: str) -> str:
    """Return a fenced block that the text cannot close, whatever backticks it holds."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return f"{fence}\n{text}\n{fence}"


def _code(text: str) -> str:
    """Return an inline code span that the text cannot close; a pipe would end a table's cell."""
    fence = "`" * (_longest_backticks(text) + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _longest_backticks(text: str) -> int:
    """Return the length of the longest run of backticks in a text."""
    return max(map(len, re.findall("`+", text)), default=0)


def model_card(settings: dict[str, Any], codec: TextCodec) -> str:
    """README.md of an export, with a hub's front matter. settings: of flallm.json.

    The license is the user's to say: a model's depends on the corpora and on the LLM it
    came from.
    """
    training = settings["training"]
    codes = list(map(tag_of, spoken(codec)))
    names = []
    for code in codes:
        language = find_language(code)
        names.append(language.name if language and language.name else code)
    front: dict[str, Any] = {
        "language": codes,
        "tags": ["sign-language-translation", "gloss-free", "flallm_ds"],
        "datasets": training["corpora"],
    }
    if training["llm_is_of_a_hub"]:
        front["base_model"] = training["llm"]
    spoken_in = _listed(names) or "a spoken language"
    parts = [
        _front_matter(front),
        f"# Sign language translation into {plain(spoken_in)}",
        _what_it_is(settings, codec),
        "## Use\n\n```python\nfrom flallm_ds.inference import Translator\n\n"
        'print(Translator.from_pretrained("FOLDER_OR_HUB_ID").translate("video.mp4"))\n```\n\n'
        "Or `flallm translate VIDEO --model FOLDER_OR_HUB_ID`. DeepSpeed is not needed for it.",
        _scores(settings["scores"]),
        _training(training),
        _began_with(settings.get("weights", {})),
        _limits(settings, codec),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def spoken(codec: TextCodec) -> list[str]:
    """The languages that a codec's model was trained to say."""
    instruction = codec.instruction
    if instruction.language:
        return [instruction.language]
    return list(filter(None, instruction.languages))


def _front_matter(front: dict[str, Any]) -> str:
    lines = ["---"]
    for name, value in front.items():
        if value:
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    lines.append(
        "# license: yours to say; those of the corpora and of the base model bind it"
    )
    lines.append("---")
    return "\n".join(lines)


def _listed(words: list[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _what_it_is(settings: dict[str, Any], codec: TextCodec) -> str:
    training, frames = settings["training"], settings["frames"]
    if settings["stage"] == "visual":
        translator = "Light-T, a small translator with weights of its own (stage 1)"
    else:
        how = f"stage {settings['stage']}, tuned: {training['tune']}"
        translator = f"the language model {plain(training['llm'])} ({how})"
    return (
        "Videos of signing in, sentences out, without glosses, by the method FLa-LLM "
        f"(arXiv 2403.12556). A visual encoder reads frames of {frames['crop_size']} "
        f"pixels, an adapter turns their features into tokens, and {translator} says the "
        f"sentence with {codec.vocab_size} pieces of vocabulary. Trained with flallm_ds."
    )


def _scores(scores: dict[str, Any]) -> str:
    titles = " | ".join(column.title for column in COLUMNS)
    table = [f"| split | {titles} |", "|---" * (len(COLUMNS) + 1) + "|"]
    text = "In percent."
    signatures = []
    for split, values in scores.items():
        if not has_scores(values):
            continue
        cells = " | ".join(column.text(values) for column in COLUMNS)
        table.append(f"| {plain(split)} | {cells} |")
        if is_low(values):
            text += (
                f" A perfect model would score BLEU-4 {CEILING.text(values)} on {split}: the "
                "tokenizer cannot write all of its references."
            )
        for key, metric in SIGNATURES.items():
            if key in values:
                signatures.append(f"- {plain(split)}, {metric}: {_code(values[key])}")
    if len(table) == 2:  # titles alone
        return ""
    text += " How they were computed:"
    return "\n".join(["## Scores", "", *table, "", text, "", *signatures])


def _training(training: dict[str, Any]) -> str:
    versions = []
    for package, version in training["versions"].items():
        versions.append(f"{package} {version}")
    corpora = _listed(list(map(plain, training["corpora"])))
    return (
        f"## Training\n\n{training['num_clips']} clips of {corpora}, {training['epochs']} "
        f"epochs.\n\n{_code_block(training['command'])}\n\n"
        f"{', '.join(versions)}."
    )


def _began_with(weights: dict[str, Any]) -> str:
    """Name what the training loaded, with the digests of its weights. weights: of
    weights.json."""
    lines = []
    for option, entry in weights.items():
        commit = f" at commit {entry['revision']}" if entry["revision"] else ""
        digests = []
        for file in entry["files"]:
            # Configurations and tokenizers are recorded too, but they hold no weights.
            if not file["file"].endswith((".json", ".txt", ".py", ".model")):
                digests.append(f"{_code(file['file'])} sha256 {file['sha256'][:16]}")
        digests = digests or ["no weights"]
        lines.append(f"- {option}: {plain(entry['name'])}{commit} ({', '.join(digests)})")
    return "\n".join(["It began with:", "", *lines]) if lines else ""


def _limits(settings: dict[str, Any], codec: TextCodec) -> str:
    frames, generation = settings["frames"], settings["generation"]
    if frames["target_fps"]:
        pace = f"{frames['target_fps']:g} frames a second are kept"
    else:
        pace = f"one frame of {frames['keep_every']} is kept"
    lines = [
        "## Limits",
        "",
        f"- At most {frames['max_frames']} frames of a video are seen: {pace}.",
        f"- A sentence has at most {generation['max_new_tokens']} pieces.",
    ]
    if codec.vocab_size < len(codec.tokenizer):
        lines.append(
            f"- The vocabulary is trimmed to the {codec.vocab_size} pieces that the "
            f"training text needs (of {len(codec.tokenizer)}): what is spelled with "
            "others cannot be said."
        )
    lines.append("- Other corpora, signers and topics than those above were not measured.")
    return "\n".join(lines)
