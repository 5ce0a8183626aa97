# Two commands do everything: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
OLDEST_PYTHON ?= python3.11
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Bytecode is kept of what is imported, whatever the environment says: else each of the suite's processes compiles its own,
# and pip would compile thousands of files that nobody imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-oldest lint format stubs bench clean

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/diloco-client demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadfile $(TEST_ARGS)

# With the oldest versions that pyproject.toml admits, in an environment of its own. What these warn of is theirs. On Linux
# torch 2.4 brings its CUDA build along, 5 GB in all, unless PIP_EXTRA_INDEX_URL names an index with a CPU build.
test-oldest:
	PYTHONWARNINGS=ignore::FutureWarning $(MAKE) test PYTHON=$(OLDEST_PYTHON) VENV=.venv-oldest \
		CONSTRAINTS=constraints-oldest.txt TEST_ARGS="-W default $(TEST_ARGS)"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto --grpc_python_out=proto proto/diloco_proto/outer.proto
	$(BIN)/python -m grpc_tools.protoc -I server --python_out=server --pyi_out=server server/diloco_server/store/state.proto

bench: $(STAMP)
	$(BIN)/python benchmarks/report.py $(BENCH)

clean:
	rm -rf $(VENV) .venv-oldest build dist demo-out

# torch comes first and pinned: its plain name would bring the CUDA build along with it.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@
