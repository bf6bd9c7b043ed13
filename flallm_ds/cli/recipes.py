"""`flallm recipes`: the list of named configurations."""

from flallm_ds.command_help import column_widths, table, wrapped
from flallm_ds.recipes import FAMILIES, RECIPES, Recipe, family_of, is_ablation

ABLATIONS = "ablations of the paper, on PHOENIX14T"


def recipes() -> None:
    """List the recipes: what each is, and its test BLEU-4 in the paper and here."""
    print(recipe_list())


def recipe_list() -> str:
    """Return the recipes by family, the ablations last."""
    # Families in the order of the table, which begins with a newcomer's own corpus.
    groups: dict[str, list[tuple[str, str, str]]] = {}
    rows: list[tuple[str, str, str]] = []
    for name, recipe in RECIPES.items():
        family = family_of(name)
        title = ABLATIONS if is_ablation(name) else f"{family}: {FAMILIES[family]}"
        row = _row(name, recipe)
        rows.append(row)
        groups.setdefault(title, []).append(row)
    widths = column_widths(rows)  # one alignment for all groups
    parts: list[str] = []
    for title, members in groups.items():
        parts.append(f"{title}\n{table(members, widths)}")
    parts.append(
        wrapped(
            "The number is the paper's test BLEU-4 (FLa-LLM, arXiv 2403.12556), - where it "
            "gives none. Ours is in brackets; the others are not measured yet."
        )
    )
    parts.append(
        "Train one stage:   deepspeed launch/train.py --recipe mine --stage visual\n"
        "Train both stages: deepspeed launch/train.py --recipe mine --stage both"
    )
    return "\n\n".join(parts)


def _row(name: str, recipe: Recipe) -> tuple[str, str, str]:
    paper = "-" if recipe.paper is None else f"{recipe.paper:.2f}"
    ours = f" (ours: {recipe.ours})" if recipe.ours else ""
    return name, f"{paper:>5}", f"{recipe.summary}{ours}"
