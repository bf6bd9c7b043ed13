"""Write the model card of an export: description, usage, scores, training and limits.

All facts come from flallm.json.
"""

import json
import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

from flallm_ds import __version__
from flallm_ds.config import RunConfig
from flallm_ds.data.index import Index
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.languages import find_language, tag_or_name
from flallm_ds.metrics.ceiling import is_low
from flallm_ds.metrics.columns import (
    CEILING,
    INTERVAL_TITLE,
    SIGNATURES,
    has_scores,
    shown_columns,
)
from flallm_ds.same_run import nearest_recipe

# Packages whose versions the card lists, after that of flallm_ds.
PACKAGES = ("torch", "transformers", "deepspeed")


def training_facts(config: RunConfig, index: Index) -> dict[str, Any]:
    """Return how a model was trained, as plain values. index: training clips.

    Absolute paths are shortened to their last part, because cards are published.
    """
    llm = None if config.stage == "visual" else config.llm.name
    return {
        "command": command(config),
        "llm": _without_folders(llm),
        "llm_is_of_a_hub": llm is not None and not Path(llm).exists(),
        "tune": None if config.stage == "visual" else config.llm.tune,
        "corpora": list(index.corpora) or [index.corpus],
        "num_clips": len(index),
        "same_clips": config.data.same_clips,
        "epochs": config.train.epochs,
        "versions": {
            "flallm_ds": __version__,
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }


def command(config: RunConfig) -> str:
    """Return a command that repeats the training.

    It uses the recipe with the fewest differences, the shards, and all options that change
    results. An absolute path becomes /path/to/ and its last part.
    """
    recipe, differences = nearest_recipe(config)
    words = ["deepspeed", "launch/train.py", f"--recipe={recipe}"]
    for option, value in differences.items():
        words.append(f"--{option}={_flag(value)}")
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """Quote a word for bash; as $'...' if it has line breaks or control characters."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = ""
    for character in word.replace("\\", r"\\").replace("'", r"\'"):
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        escaped += character
    return f"$'{escaped}'"


def _flag(value: Any) -> str:
    """Format the value of an option as on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(_flag, value))
    if isinstance(value, str) and value.startswith("/"):
        return f"/path/to/{Path(value).name}"
    return str(value)


def _without_folders(value: str | None) -> str | None:
    """Return the last part of an absolute path; other values unchanged."""
    if value is not None and value.startswith("/"):
        return Path(value).name
    return value


def plain(text: str) -> str:
    """Escape text of a corpus or a config for Markdown: no markup, no HTML, one line."""
    visible = ""
    for character in text:
        visible += character if character.isprintable() else " "
    return re.sub(r"([\\`*_\[\]<>&|#])", r"\\\1", visible)


def _code_block(text: str) -> str:
    """Return a fenced code block that backticks in the text cannot close."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return f"{fence}\n{text}\n{fence}"


def _code(text: str) -> str:
    """Return an inline code span that backticks in the text cannot close.

    Do not use it in a table, where a pipe would end the cell.
    """
    fence = "`" * (_longest_backticks(text) + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _longest_backticks(text: str) -> int:
    """Return the length of the longest run of backticks in a text."""
    return max(map(len, re.findall("`+", text)), default=0)


def model_card(settings: dict[str, Any], codec: TextCodec) -> str:
    """Return the README.md of an export, with the front matter of the hub.

    settings: content of flallm.json. The user must add the license, which depends on the
    corpora and on the base model.
    """
    training = settings["training"]
    codes = list(map(tag_or_name, spoken(codec)))
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
    """Return the target languages with which a model was trained."""
    instruction = codec.instruction
    if instruction.language:
        return [instruction.language]
    return list(filter(None, instruction.languages))


def _front_matter(front: dict[str, Any]) -> str:
    """Return YAML metadata for the hub. JSON values are valid YAML."""
    lines = ["---"]
    for name, value in front.items():
        if value:
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    lines.append(
        "# license: add yours; the licenses of the corpora and the base model apply"
    )
    lines.append("---")
    return "\n".join(lines)


def _listed(words: list[str]) -> str:
    """Join words as in "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _what_it_is(settings: dict[str, Any], codec: TextCodec) -> str:
    """Describe task, method and parts of the model."""
    training, frames = settings["training"], settings["frames"]
    if settings["stage"] == "visual":
        translator = "Light-T, a small translator that was trained from scratch (stage 1),"
    else:
        how = f"stage {settings['stage']}, tuning: {training['tune']}"
        translator = f"the language model {plain(training['llm'])} ({how})"
    return (
        "This model translates videos of signing into sentences without glosses, by the "
        "method FLa-LLM (arXiv 2403.12556). A visual encoder computes features of frames of "
        f"{frames['crop_size']} pixels, an adapter maps them to embeddings, and {translator} "
        f"generates the sentence with a vocabulary of {codec.vocab_size} tokens. Trained with "
        "flallm_ds."
    )


def _scores(scores: dict[str, Any]) -> str:
    """Return a table of scores by split, ceilings and signatures; empty without scores."""
    scored = {split: one for split, one in scores.items() if has_scores(one)}
    columns = shown_columns(scored.values())
    titles = " | ".join(column.title for column in columns)
    table = [f"| split | {titles} |", "|---" * (len(columns) + 1) + "|"]
    text = "In percent."
    signatures = []
    for split, values in scored.items():
        cells = " | ".join(column.text(values) for column in columns)
        table.append(f"| {plain(split)} | {cells} |")
        if "intervals" in values:
            bounds = " | ".join(column.interval_text(values) for column in columns)
            table.append(f"| {INTERVAL_TITLE} | {bounds} |")
        if is_low(values):
            text += (
                f" A perfect model would score BLEU-4 {CEILING.text(values)} on "
                f"{plain(split)}, because the tokenizer changes some references."
            )
        for key, metric in SIGNATURES.items():
            if key in values:
                signatures.append(f"- {plain(split)}, {metric}: {_code(values[key])}")
    if not scored:
        return ""
    text += " Signatures of the metrics:"
    return "\n".join(["## Scores", "", *table, "", text, "", *signatures])


def _training(training: dict[str, Any]) -> str:
    """Return the corpora, the command and the versions of packages."""
    versions = []
    for package, version in training["versions"].items():
        versions.append(f"{package} {version}")
    corpora = _listed(list(map(plain, training["corpora"])))
    averaged = ""
    if steps := training.get("averaged_steps"):
        listed = _listed([f"{step:,}" for step in steps])
        averaged = f" The weights are the mean of those after steps {listed}."
    return (
        f"## Training\n\n{training['num_clips']} clips of {corpora}, {training['epochs']} "
        f"epochs.{averaged}\n\n{_code_block(training['command'])}\n\n"
        f"{', '.join(versions)}."
    )


def _began_with(weights: dict[str, Any]) -> str:
    """List the pretrained weights with their digests. weights: content of weights.json."""
    lines = []
    for option, entry in weights.items():
        commit = f" at commit {entry['revision']}" if entry["revision"] else ""
        digests = []
        for file in entry["files"]:
            # Skip recorded configurations and tokenizers, which contain no weights.
            if not file["file"].endswith((".json", ".txt", ".py", ".model")):
                digests.append(f"{_code(file['file'])} sha256 {file['sha256'][:16]}")
        digests = digests or ["no weights"]
        lines.append(f"- {option}: {plain(entry['name'])}{commit} ({', '.join(digests)})")
    return "\n".join(["Pretrained weights:", "", *lines]) if lines else ""


def _limits(settings: dict[str, Any], codec: TextCodec) -> str:
    """List limits of length, vocabulary and evaluation."""
    frames, generation = settings["frames"], settings["generation"]
    if frames["target_fps"]:
        sampling = f"{frames['target_fps']:g} frames per second are kept"
    else:
        sampling = f"one frame of {frames['keep_every']} is kept"
    lines = [
        "## Limits",
        "",
        f"- At most {frames['max_frames']} frames of a video are used: {sampling}.",
        f"- A sentence has at most {generation['max_new_tokens']} tokens.",
    ]
    if codec.vocab_size < len(codec.tokenizer):
        lines.append(
            f"- The vocabulary is trimmed to the {codec.vocab_size} tokens that the "
            f"training text needs (of {len(codec.tokenizer)}). Words that need other tokens "
            "cannot be generated."
        )
    # Exports of earlier versions do not say it.
    same_clips = settings["training"].get("same_clips")
    if same_clips == "refuse":
        lines.append(
            "- No clip of the dev and test splits of these shards is a training clip, by id, "
            "source video and text. Equal texts may occur in several clips."
        )
    elif same_clips == "allow":
        lines.append(
            "- The dev and test splits were allowed to contain training clips "
            "(data.same_clips=allow): scores on them may be too high."
        )
    lines.append("- The model was not evaluated on other corpora, signers or topics.")
    return "\n".join(lines)
