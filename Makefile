# The two commands of the README, and what maintainers use. GPU=1 installs torch's CUDA build.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CONSTRAINT := $(if $(GPU),,-c constraints-cpu.txt)
WORKERS ?= 2

.PHONY: demo install test test-slow contracts lint docs bench clean

$(VENV)/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(CONSTRAINT) -e '.[dev]'
	touch $@

install:
	@echo "installing treadle and what its tests need into $(VENV)/: about 3 GB, two to five minutes"
	@$(MAKE) --no-print-directory $(VENV)/ready
	@echo "treadle is in $(BIN)/: type  source $(BIN)/activate  and then  treadle --help"

# What is coming is said before the first long wait, so the environment is no prerequisite here.
demo:
	@echo "make demo does three things; Ctrl-C is safe at any time, and the same command goes on from there:"
	@echo "  1. installs treadle into $(VENV)/: about 3 GB with what the tests need, two to five minutes (nothing when it is there already)"
	@echo "  2. trains a model of 4.1 million parameters on six novels, 1500 steps: about 3 minutes on two fast, idle CPU cores,"
	@echo "     20 on slow or busy ones; every line says how long is left (ETA). The run goes to runs/austen/"
	@echo "  3. lets it write 150 tokens and prints what to try next: seconds"
	@echo
	@$(MAKE) --no-print-directory $(VENV)/ready
	$(BIN)/treadle train
	$(BIN)/treadle generate last --prompt "She had " --max-new-tokens 150 --temperature 0.8
	@echo
	@echo "Next:"
	@echo "  $(BIN)/treadle eval last                          # against simple baselines"
	@echo "  $(BIN)/treadle generate last --interactive        # talk to it"
	@echo "  $(BIN)/treadle train --max_steps 3000             # the same run, longer"
	@echo "  $(BIN)/treadle train YOUR_TEXT.txt                # your own text"

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow and not realmodel" -n $(WORKERS)

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m "slow or realmodel"

contracts: $(VENV)/ready
	$(BIN)/python -m tools.contract_board

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy treadle

# build/site/index.html; the variable silences a notice of the theme's about its successor.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(VENV)/ready
	$(BIN)/python -m bench.peers.environment
	$(BIN)/python -m bench
	$(BIN)/python -m bench.report

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .mypy_cache
