# The two commands of the README, and what maintainers use. GPU=1 installs torch's CUDA build.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CONSTRAINT := $(if $(GPU),,-c constraints-cpu.txt)
WORKERS ?= 2

.PHONY: demo test test-slow lint bench clean

$(VENV)/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(CONSTRAINT) -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/treadle train
	$(BIN)/treadle generate last --prompt "She had " --max-new-tokens 150 --temperature 0.8
	@echo
	@echo "Next:"
	@echo "  $(BIN)/treadle eval last                          # against simple baselines"
	@echo "  $(BIN)/treadle generate last --interactive        # talk to it"
	@echo "  $(BIN)/treadle train --max_steps 2400             # the same run, longer"
	@echo "  $(BIN)/treadle train YOUR_TEXT.txt                # your own text"

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS)

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy treadle

bench: $(VENV)/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check $(CONSTRAINT) -e '.[bench]'
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .mypy_cache
