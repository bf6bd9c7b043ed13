"""`flallm recipes`: the table of named runs."""

from flallm_ds.recipes import RECIPES


def recipes() -> None:
    """List the named runs: what each is, and its test BLEU-4 in the paper and here."""
    rows = [("name", "what it is", "paper", "ours")]
    for name, recipe in RECIPES.items():
        paper = "-" if recipe.paper is None else f"{recipe.paper:.2f}"
        rows.append((name, recipe.summary, paper, recipe.ours or "not measured"))
    name_width = max(len(row[0]) for row in rows)
    summary_width = max(len(row[1]) for row in rows)
    for name, summary, paper, ours in rows:
        print(f"{name:{name_width}}  {summary:{summary_width}}  {paper:>5}  {ours}")
    print(
        "\nScores: test BLEU-4. Paper: FLa-LLM (arXiv 2403.12556), whose tables are named "
        "above; - where it gives none.\nTrain one: deepspeed launch/train.py --recipe=NAME"
    )
