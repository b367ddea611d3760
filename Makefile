# make demo | test | lab | bench | gpu | course | slides | site | clean;  `make help` says what each does.
PYTHON ?= python3
VENV   ?= .venv
# Index of PyTorch wheels, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small CPU build.
TORCH_INDEX ?=
RUN := $(VENV)/bin
ifneq ($(words $(VENV)),1)
$(error VENV must be one path without spaces, and is "$(VENV)")
endif

# A machine that already has a suitable torch keeps it: the virtual environment then sees the system's packages.
HAS_TORCH = $(PYTHON) -c "import torch, torchvision; v = torch.__version__.split('.'); assert (int(v[0]), int(v[1])) >= (2, 9)" 2>/dev/null

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lab bench gpu course slides site class lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo "  variables: PYTHON=python3.12, VENV=.venv, TORCH_INDEX=URL of PyTorch wheels (CPU or CUDA)"

demo: $(VENV)/.notebooks  ## set up, run the main job headlessly, write runs/demo/report.html
	"$(RUN)"/dispersive-kit run demo --out runs/demo --resume

lab: $(VENV)/.notebooks  ## set up and open the notebooks in JupyterLab
	"$(RUN)"/dispersive-kit lab

test: $(VENV)/.test  ## set up and run all tests, and every notebook in smoke mode
	"$(RUN)"/python -m pytest -n 2 --dist loadgroup -m "not long"
	DISPERSIVE_KIT_MODE=smoke PYTHONPATH=tests "$(RUN)"/python -m pytest -p conftest -n 2 --nbmake --nbmake-kernel=python3 --nbmake-timeout=120 notebooks

test-long: $(VENV)/.test  ## the long kill and fuzz series
	"$(RUN)"/python -m pytest -n 2 --dist loadgroup -m long

bench: $(VENV)/.test  ## every benchmark: ratios against a named alternative
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; "$(RUN)"/python $$script || exit 1; done

# Needs a Python with PyTorch and pytest, and no network: that of the environment if there is one.
GPU_PYTHON = $(if $(wildcard $(RUN)/python),$(RUN)/python,$(PYTHON))
gpu: export PYTHONPATH = $(CURDIR)
gpu:  ## on a GPU: its tests and its benchmark (eight minutes), written to runs/bench-gpu.json
	@gpus=$$($(GPU_PYTHON) -c "import torch; print(torch.cuda.device_count())") || exit 1; \
	if [ "$$gpus" = 0 ]; then echo "no GPU that PyTorch can use here: tests/gpu and bench_gpu were left out"; exit 0; fi; \
	$(GPU_PYTHON) -m pytest -q --confcutdir=tests/gpu tests/gpu; tests=$$?; \
	$(GPU_PYTHON) tests/benchmarks/bench_gpu.py && exit $$tests

course: $(VENV)/.course  ## the exercises as a course for nbgrader in build/course, and three students graded (half an hour)
	"$(RUN)"/python data/make_course.py build/course

class: $(VENV)/.course
	"$(RUN)"/dispersive-kit run quick --mode class --out runs/class --resume

slides: class  ## a deck for each session of the course in build/slides, offline, from a run in class mode (a quarter of an hour)
	"$(RUN)"/python data/make_site.py runs/class build/slides slides

site: class  ## all notebooks as executed in class mode, as static pages in runs/site (a quarter of an hour)
	"$(RUN)"/python data/make_site.py runs/class runs/site

lint: $(VENV)/.test  ## ruff, mypy, import-linter
	"$(RUN)"/ruff check .
	"$(RUN)"/ruff format --check .
	"$(RUN)"/mypy
	"$(RUN)"/lint-imports

clean:  ## remove the environment, caches and the demo run; other runs and data/ stay
	rm -rf "$(VENV)" runs/demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/constraints.txt: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@if $(HAS_TORCH); then \
	  echo "keeping the torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --system-site-packages "$(VENV)" && grep -vE '^(torch|torchvision)==' constraints.txt > "$@"; \
	else \
	  $(PYTHON) -m venv "$(VENV)" && cp constraints.txt "$@"; \
	fi

$(VENV)/.notebooks: $(VENV)/constraints.txt pyproject.toml
	@echo "installing the kit and its extras for notebooks into $(VENV) (some minutes, some GB: PyTorch is among it)"
	@[ -z "$(TORCH_INDEX)" ] || "$(RUN)"/pip install -q -c "$(VENV)/constraints.txt" --index-url "$(TORCH_INDEX)" torch torchvision
	"$(RUN)"/pip install -q -c "$(VENV)/constraints.txt" -e '.[notebooks,latents]'
	@mkdir -p "$(VENV)"/share/jupyter/lab/settings  # no news popup: it covers figures, and asks the network
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' > "$(VENV)"/share/jupyter/lab/settings/overrides.json
	@touch "$@"

$(VENV)/.course: $(VENV)/.notebooks
	"$(RUN)"/pip install -q -c "$(VENV)/constraints.txt" -e '.[course]'
	@touch "$@"

$(VENV)/.test: $(VENV)/.notebooks
	"$(RUN)"/pip install -q -c "$(VENV)/constraints.txt" -e '.[test]'
	@touch "$@"
