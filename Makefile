# make run: set up .venv, then run the main job.   make test: set up, then lint and types beside the tests.
# Both can be repeated: set-up is skipped while pyproject.toml and constraints.txt are unchanged, finished work is found.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run test suite docs setup lint clean
.DEFAULT_GOAL := run

run: setup
	@echo "== main job: W4A8 with timestep-aware smoothing on the tiny video model"
	"$(BIN)/python" run.py experiment=w4a8_ts_smooth

# Lint and types take half a minute on one core, which the tests' two processes have to spare now and then.
test: setup
	@$(MAKE) --no-print-directory --jobs 2 lint suite

# Each file runs in one process, in the order of tests/conftest.py. With bytecode, whatever the shell says: else each
# process that a test starts compiles the package anew.
suite: setup
	@echo "== tests"
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest \
	  --numprocesses 2 --dist loadfile --no-loadscope-reorder

docs: setup
	@echo "== documentation: outputs/site/index.html; a broken link ends it"
	NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" build --quiet

lint: setup
	@echo "== format, lint, types"
	"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/mypy"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== set-up: virtual environment $(VENV) with the tested versions (constraints.txt)"
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	"$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	@echo "== bytecode on the cores that pip leaves free: it would take twice as long on its one"
	"$(BIN)/python" -m compileall -q -q "$(VENV)/lib" & \
	  "$(BIN)/python" -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"; \
	  status=$$?; wait; exit $$status
	"$(BIN)/python" -m compileall -q -q -j 0 "$(VENV)/lib" viditq hydra_plugins || true # some packages hold templates, which are no Python
	@touch "$(STAMP)"

clean:
	rm -rf "$(VENV)" outputs multirun
