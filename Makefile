# make run                                   all notebooks, quickly, on digits, offline: results in build/
# make run DATASET=cifar10 PROFILE=quick     the same on CIFAR-10
# make run DATASET=cifar10 PROFILE=full      the real thing: refreshes notebooks/, figures/ and checkpoints/
DATASET ?= digits
PROFILE ?= quick
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed

.PHONY: run test lint readme clean

run: $(INSTALLED)
	$(VENV)/bin/python -m resnet_pruning.notebooks --dataset $(DATASET) --profile $(PROFILE)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

readme: $(INSTALLED)
	$(VENV)/bin/python -m resnet_pruning.readme

clean:
	rm -rf build .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}: try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt --editable .
	touch $@
