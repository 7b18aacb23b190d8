# Isthmus: `make demo` shows it, `make test` proves it, `make check` holds the style,
# `make bench` measures it. `make help` lists the rest.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH_VERSION ?= 2.13.0
# cpu or cuda; the default asks the machine.
TORCH_VARIANT ?= $(if $(wildcard /dev/nvidia0),cuda,cpu)
PYTEST ?= $(BIN)/python -m pytest
# Test processes at once, for the levels whose tests share nothing.
JOBS ?= 2
ONCE ?=
# Options of `python -m benchmarks`, as in make bench BENCH_FLAGS="--quick --only gateway".
BENCH_FLAGS ?=
KERNEL_SOURCES := $(shell find engine/kernels -name '*.c' -o -name '*.h' 2>/dev/null)

.PHONY: help install install-dev demo test test-long check format protos bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo [ONCE=1]  install, fetch the demo model, start a mesh, ask one question"
	@echo "make test           install what the tests need, then all tests but the long ones"
	@echo "make test-long      the long ones too"
	@echo "make check          format, lint, types, import borders, stubs"
	@echo "make bench          measure; writes bench-results/; BENCH_FLAGS=--quick is shorter"
	@echo "make format         rewrite the sources in the house style"
	@echo "make protos         regenerate the stubs"
	@echo "make clean          remove the environment and everything built"

# Each stamp is older than what it was made from exactly when it must be made again.
install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.created:
	@$(PYTHON) deploy/bootstrap/check_python.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	$(BIN)/python deploy/bootstrap/install_torch.py $(TORCH_VERSION) $(TORCH_VARIANT)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(wildcard setup.py) $(KERNEL_SOURCES)
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml $(wildcard setup.py) $(KERNEL_SOURCES)
	$(BIN)/python -m pip install --editable ".[dev]"
	@touch $(VENV)/.installed $@

demo: install
	$(BIN)/isthmus demo $(if $(filter-out 0,$(ONCE)),--once)

# Tests of the first levels run side by side; e2e tests start whole meshes, so one at a time.
test: install-dev
	$(PYTEST) -m "not slow" -n $(JOBS) --dist worksteal tests/unit tests/service tests/distributed
	$(PYTEST) -m "not slow" tests/e2e tests/chaos

test-long: install-dev
	$(PYTEST) tests

check: install-dev
	$(BIN)/python -m protos.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/lint-imports

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: install-dev
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
		protos/isthmus/v1/*.proto

bench: install
	$(BIN)/python -m benchmarks $(BENCH_FLAGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache \
		.import_linter_cache .hypothesis bench-results
	find . -name __pycache__ -prune -exec rm -rf {} +
	find engine -name '*.so' -delete
