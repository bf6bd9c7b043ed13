"""Every error that a user can see has one of the three forms of CONTRIBUTING.md."""

import ast
import re

import pytest

from tests.helpers.paths import ROOT

SHOWN = (
    "UserError",
    "RankError",
    "SharedRankError",
    "ShardFault",
    "BrokenVideo",
    "Refused",
)
# wrong value: NAME must CONDITION, got VALUE. REMEDY.
# failure: Cannot VERB OBJECT: REASON. REMEDY.
# conflict: THING belongs to, is in use by, was made with ... REMEDY.
FORMS = re.compile(
    r" must .*, got |\bCannot [\w{]|"
    r"belongs to|in use by|already exists|has changed since|"
    r"(was|were) (built|saved|trained|made|written|exported) (with|by|for|from)",
    re.DOTALL,
)
# Texts that another sentence completes, as `{sentence} More advice.`
COMPLETED = re.compile(r"^(\{\}|\{\?\})")


def text_of(node: ast.expr) -> str:
    """The literal parts of a string expression; {} stands for the others."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{}"
            for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "{?}"


def sentences() -> dict[str, str]:
    """The text of each raise of a shown error and of each `require`, by file and line."""
    found = {}
    for path in sorted((ROOT / "flallm_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rsplit(".", 1)[-1]
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            if name in SHOWN and node.args:
                found[place] = text_of(node.args[0])
            elif name == "require" and len(node.args) > 1:
                found[place] = text_of(node.args[1])
    return found


SENTENCES = sentences()


@pytest.mark.parametrize("place", SENTENCES)
def test_an_error_names_a_condition_a_failure_or_a_conflict(place: str) -> None:
    text = SENTENCES[place]
    assert FORMS.search(text) or COMPLETED.match(text), text


def test_the_forms_refuse_other_sentences() -> None:
    assert len(SENTENCES) > 300
    for text in ("there is no file {}.", "{} is broken", "seed must be 0, but is {}."):
        assert not FORMS.search(text)
