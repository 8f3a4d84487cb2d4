# Two commands for newcomers: `make demo` and `make test`. Everything they need is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Pins: an open range of torch pulls gigabytes of CUDA libraries; onnxruntime-gpu runs on machines without a GPU too.
TORCH ?= torch==2.13.0
ONNXRUNTIME ?= onnxruntime-gpu==1.31.1
WORKERS ?= 2

.PHONY: demo test lint types unit plugin plugin-headers wheel bench clean

demo: $(VENV)/.installed
	$(BIN)/qpipe demo

test: $(VENV)/.tested lint types plugin unit

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/mypy

unit: $(VENV)/.tested plugin
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

plugin: $(VENV)/.installed plugin-headers
	$(BIN)/qpipe plugin build

plugin-headers:
	sh plugins/fetch_headers.sh

# A wheel with the plugin library of this machine inside; its tag names the platform.
wheel: plugin
	$(PIP) wheel --quiet --no-deps --wheel-dir dist \
	  --config-settings=--build-option=--plat-name=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_platform())') .

bench: $(VENV)/.tested
	for program in tests/bench/*.py; do $(BIN)/python $$program || exit 1; done

readme: plugin $(VENV)/.tested
	$(BIN)/python tests/bench/demo.py --write README.md
	$(BIN)/python tests/bench/schemes.py --write README.md
	$(BIN)/python tests/conformance/capabilities.py --write README.md

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet '$(TORCH)'
	$(PIP) install --quiet '$(ONNXRUNTIME)' -e '.[models]'
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) install --quiet -e '.[models,test,conformance,cluster,ray]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
