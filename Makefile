# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
# On Linux the registry's default torch brings several GB of CUDA packages; any torch that is installed first is kept.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo-output
# About a minute on 2 cores.
DEMO_STEPS ?= 250
# Processes that share the tests; each takes about 1 GB.
WORKERS ?= 2
SMOLLM2 := smollm2-output
CALIBRATION ?= fixtures/calibration.txt
# Evaluation text of `make smollm2`; empty: the built-in sample.
TEXT ?=

# Of `make fuzz`: how long, and from which number the inputs are made.
MINUTES ?= 30
SEED ?= 1

# Of `make test-coremltools`: one op test in so many; 1 runs all of them.
SAMPLE ?= 1

.PHONY: demo test test-slow test-browser test-coreai test-coremltools fuzz lint smollm2 clean

demo: $(READY)
	mkdir -p $(DEMO)
	$(BIN)/edkm-export train fixtures/tiny-llama --data $(CALIBRATION) --self-generated 32768 --preset 3bit --context 256 \
		--steps $(DEMO_STEPS) --eval-text fixtures/heldout.txt -o $(DEMO)/tiny-train --overwrite
	$(BIN)/edkm-export coreml $(DEMO)/tiny-train/model.pt --text fixtures/heldout.txt --sequence-length 256 \
		-o $(DEMO)/tiny-coreml --overwrite

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile

# The report in headless Chromium, which `python -m playwright install chromium` brings.
test-browser: $(READY)
	$(BIN)/python -m pytest -m browser

# Core AI models in Apple's runtime for Linux (x86-64, Python 3.11 and later).
test-coreai: $(READY)
	$(BIN)/python -m pip install --quiet -e ".[dev,coreai]"
	$(BIN)/python -m pytest tests/converters/coreai tests/cli/test_cli_coreai.py \
		tests/verify/test_coreai_mutations_found.py
	$(BIN)/python -m pytest tests/decoder/test_family_cells.py -k "Core and AI"

# coremltools' own tests with predictions by the interpreter.
test-coremltools: $(READY)
	$(BIN)/python -m pip install --quiet -e ".[coremltools-tests]"
	$(BIN)/python -m benchmarks.coremltools_suite --sample $(SAMPLE) --workers $(WORKERS)

# Hostile inputs for every reader; what it finds, it says how to repeat.
fuzz: $(READY)
	$(BIN)/python -m tests.hostile.fuzzing --minutes $(MINUTES) --seed $(SEED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smollm2: $(READY)
	mkdir -p $(SMOLLM2)
	$(BIN)/python -m benchmarks.fetch_smollm2 $(SMOLLM2)
	$(BIN)/edkm-export palettize $(SMOLLM2)/SmolLM2-135M-Instruct.Q4_1.gguf --bits 4 --group-size 16 \
		--calibration $(CALIBRATION) -o $(SMOLLM2)/smollm2.pt --overwrite
	$(BIN)/edkm-export coreml $(SMOLLM2)/smollm2.pt $(if $(TEXT),--text $(TEXT)) --overwrite

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) $(SMOLLM2)
