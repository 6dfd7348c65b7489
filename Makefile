# make run                                   the notebooks of the assignment, quickly, on digits, offline: results in build/
# make run NOTEBOOKS=all                     all notebooks; or some, by how their names begin: NOTEBOOKS="02 08"
# make run DATASET=cifar10 PROFILE=quick     the same on CIFAR-10
# make run DATASET=cifar10 PROFILE=full      the real thing: refreshes notebooks/, figures/ and checkpoints/
# make lab                                   JupyterLab on notebooks/
# make lock                                  newest versions within pyproject.toml's ranges into requirements.lock, which all the above install
DATASET ?= digits
PROFILE ?= quick
NOTEBOOKS ?= assignment
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed

.PHONY: run lab test lint readme lock clean

run: $(INSTALLED)
	$(VENV)/bin/python -m resnet_pruning.report.notebooks --dataset $(DATASET) --profile $(PROFILE) --only $(NOTEBOOKS)

lab: $(INSTALLED)
	$(VENV)/bin/jupyter lab notebooks

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

readme: $(INSTALLED)
	$(VENV)/bin/python -m resnet_pruning.report.readme

lock: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --all-extras --upgrade --output-file requirements.lock pyproject.toml

clean:
	rm -rf build .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}: try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
