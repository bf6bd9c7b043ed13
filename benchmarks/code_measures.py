"""Measure the code of commits and compare them.

python -m benchmarks.code_measures A,B

Prints a Markdown table with one column for each commit. The files of one training step are
those of the product in which a function was called between two steps of stage visual: loop,
data-loading threads, model, engine.
"""

import ast
import io
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loss_compare import OPTIONS, checkout, environment_of, make_corpus
from flallm_ds.command import main

PRODUCT = ("flallm_ds", "launch", "shards")
WIDE = 90  # columns
# Modules of the dataclasses with the options, in this layout and in the first one.
OPTION_MODULES = ("flallm_ds.config", "flallm_ds.config.sections", "flallm_ds.config.run")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# Runs launch/train.py and records the files whose functions are called between the second
# and the third step: in all threads, and in the main thread within Task.step.
TRACED = """
import runpy, sys, threading
steps, files = 0, set()
inside, own = False, set()  # whether Task.step runs in the main thread
def profile(frame, event, argument):
    global steps, inside
    path = frame.f_code.co_filename
    if event not in ("call", "return"):  # those of C functions have the frame of the caller
        return
    if path.endswith("training/task.py") and frame.f_code.co_name == "step":
        inside = event == "call"
    if event != "call":
        return
    if inside and steps == 2 and "/flallm_ds/" in path and "site-packages" not in path:
        if threading.current_thread() is threading.main_thread():
            own.add(path.partition("/flallm_ds/")[2])
    if path.endswith("training/progress.py") and frame.f_code.co_name == "step":
        steps += 1
    elif steps == 2 and "/flallm_ds/" in path and "site-packages" not in path:
        files.add(path.partition("/flallm_ds/")[2])
threading.setprofile(profile)
sys.setprofile(profile)
sys.argv = sys.argv[1:]
sys.path.insert(0, "launch")  # as for a script there
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("FILES", *sorted(files))
    print("TASK", *sorted(own))
"""


@dataclass(frozen=True)
class Source:
    """A Python file: path relative to the root of the commit, lines, syntax tree."""

    path: str
    lines: list[str]
    tree: ast.Module

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def code_measures(commits: tuple[str, ...] = ("HEAD",), *, step: bool = True) -> None:
    """Print the table. step: also train a few steps to count the files of a step."""
    columns = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, commit in enumerate(commits):
            tree = folder / str(number)
            checkout(commit, tree)
            columns[commit] = measures(tree)
            if step:
                columns[commit] |= step_measures(tree, folder)
    print("| | " + " | ".join(columns) + " |")
    print("|---|" + "--:|" * len(columns))
    for name in next(iter(columns.values())):
        cells = [column[name] for column in columns.values()]
        print(f"| {name} | {' | '.join(cells)} |")


def measures(root: Path) -> dict[str, str]:
    """Return the measures of a source tree, formatted for the table."""
    product = [source for folder in PRODUCT for source in read(root, folder)]
    tests = list(read(root, "tests"))
    num_lines, num_test_lines = (
        sum(len(s.lines) for s in some) for some in (product, tests)
    )
    largest = max(product, key=lambda source: len(source.lines))
    longest, length = max(functions(product), key=lambda found: found[1])
    wide = sum(len(line) > WIDE for source in product for line in source.lines)
    num_comments = sum(map(comments, product))
    nodes = [node for source in product for node in ast.walk(source.tree)]
    comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in nodes)
    return {
        "lines of the product": f"{num_lines:,}",
        "files": str(len(product)),
        "largest file": f"{len(largest.lines)} ({largest.path})",
        "longest function": f"{length} ({longest})",
        "import cycles": str(len(cycles(product))),
        "imports inside functions": str(sum(map(inner_imports, product))),
        f"lines over {WIDE} columns": f"{100 * wide / num_lines:.1f} %",
        "lines with a comment": f"{100 * num_comments / num_lines:.1f} %",
        "comprehensions per 1,000 lines": f"{1000 * comprehensions / num_lines:.1f}",
        "options of a training run": str(num_options(root)),
        "lines of tests / lines of the product": f"{num_test_lines / num_lines:.2f}",
    }


def read(root: Path, folder: str) -> Iterator[Source]:
    """Read all Python files of a folder."""
    for path in sorted((root / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield Source(str(path.relative_to(root)), text.splitlines(), ast.parse(text))


def functions(sources: list[Source]) -> Iterator[tuple[str, int]]:
    """Yield (name, number of lines) of each function."""
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, FUNCTIONS):
                assert node.end_lineno is not None
                yield f"{source.path}:{node.name}", node.end_lineno - node.lineno + 1


def comments(source: Source) -> int:
    """Count the lines with a comment, without those that are for a tool."""
    text = "\n".join(source.lines) + "\n"
    found = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_comment = token.type == tokenize.COMMENT
        found += is_comment and not token.string.startswith(("# noqa", "# type:"))
    return found


def inner_imports(source: Source) -> int:
    """Count the import statements inside functions."""
    found = set()
    for function in ast.walk(source.tree):
        if isinstance(function, FUNCTIONS):
            found |= {
                node
                for node in ast.walk(function)
                if isinstance(node, ast.Import | ast.ImportFrom)
            }
    return len(found)


def cycles(sources: list[Source]) -> list[list[str]]:
    """Return groups of modules that import each other, also by imports inside functions."""
    modules = {source.module for source in sources}
    imports = {source.module: imported(source, modules) for source in sources}
    reached = {module: reach(module, imports) for module in modules}
    groups = {
        tuple(sorted(m for m in reached[one] if one in reached[m])) for one in modules
    }
    return [list(group) for group in groups if len(group) > 1]


def imported(source: Source, modules: set[str]) -> set[str]:
    """Return the modules of the product that a file imports.

    A package counts if a name that it defines itself is imported.
    """
    found = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules else node.module)
    return (found & modules) - {source.module}


def reach(module: str, imports: dict[str, set[str]]) -> set[str]:
    """Return all modules that a module imports, directly or indirectly."""
    found: set[str] = set()
    left = [module]
    while left:
        for other in imports[left.pop()] - found:
            found.add(other)
            left.append(other)
    return found


def num_options(root: Path) -> int:
    """Count the fields of the dataclasses of a run, except those of type section."""
    count = 0
    for source in read(root, "flallm_ds"):
        if source.module in OPTION_MODULES:
            classes = [node for node in source.tree.body if isinstance(node, ast.ClassDef)]
            fields = [node for one in classes for node in one.body]
            hints = [f.annotation for f in fields if isinstance(f, ast.AnnAssign)]
            count += sum(not ast.unparse(hint).endswith("Config") for hint in hints)
    return count


def step_measures(tree: Path, folder: Path) -> dict[str, str]:
    """Count the files of the package whose functions run in one training step.

    Once with the loop, its records and the data-loading threads, and once from a batch in
    memory to the new weights, which is `Task.step`.
    """
    make_corpus(folder)
    places = {
        "run": tree / "run",
        "data.shards": folder / "shards",
        "llm.name": folder / "llm",
    }
    options = (
        OPTIONS
        | {name: str(path) for name, path in places.items()}
        | {"train.max_steps": "4"}
    )
    words = [
        "launch/train.py",
        "--stage=visual",
        *(f"--{n}={value}" for n, value in options.items()),
    ]
    command = [sys.executable, "-c", TRACED, *words]
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment_of(tree),
        capture_output=True,
        text=True,
        check=False,
    )
    files: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, *found = line.split() or [""]
        if name in ("FILES", "TASK"):
            files[name] = found
    assert files, done.stdout[-2000:] + done.stderr[-2000:]
    return {
        "files of one training step, with loop and data loading": str(len(files["FILES"])),
        "files of Task.step alone": str(len(files["TASK"]) or "-"),
    }


if __name__ == "__main__":
    main(code_measures)
