# `make quickstart`, `make test`, `make check` and `make docs` create .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
# pip compiles nothing, so Python must be free to keep the bytecode of what it imports: 7 s at every start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test check docs bench gpu clean

quickstart: .venv/ready  ## corpus -> shards -> stage visual -> stage llm -> scores -> a translated video
	$(BIN)/python launch/quickstart.py

test: .venv/ready  ## every test that this machine can run
	$(BIN)/python -m pytest
	if command -v nvidia-smi > /dev/null; then $(BIN)/python -m pytest -m gpu; fi

check: .venv/ready  ## style, types, spelling and wording
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: .venv/docs-ready  ## the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/ready  ## the figures of benchmarks/results, on a machine that does nothing else (half an hour)
	for name in loader plan build memory clip_format; do \
		$(BIN)/python -m benchmarks.$$name --out=benchmarks/results || exit 1; done

gpu: .venv/ready  ## what needs a GPU: its tests, and the figures of both stages (half an hour)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[gpu]'
	$(BIN)/python -m pytest -m gpu
	for name in gpu llm_gpu; do $(BIN)/python -m benchmarks.$$name --out=benchmarks/results || exit 1; done

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $$(command -v $(PYTHON) || command -v python3) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch .venv/docs-ready

clean:
	rm -rf .venv data runs build *.egg-info
