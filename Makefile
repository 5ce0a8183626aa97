# Two commands do everything: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint format stubs bench clean

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/diloco-client demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadfile $(TEST_ARGS)

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
	$(BIN)/python benchmarks/kernels.py --json

clean:
	rm -rf $(VENV) build dist demo-out

# torch comes first and pinned: its plain name would bring the CUDA build along with it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
