# `make figures` runs the main job, `make test` the tests; each sets up .venv itself when it is missing or out of date.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
READY := .venv/.ready
TOOLS := .venv/.tools
# no warnings on editable installs, nor on package sources that a machine's settings name and lack; errors stay
PIP := PYTHONWARNINGS=ignore .venv/bin/python -m pip --disable-pip-version-check install --quiet
QUIET := 2> >(grep -v "is ignored: it is neither a file nor a directory" >&2)
SHELL := /bin/bash
# the pinned versions are for Python >= 3.11; on 3.10 pip takes the newest that pyproject.toml allows
install = if .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	 then $(PIP) --constraint constraints.txt --editable '$(1)' $(QUIET); \
	 else $(PIP) --editable '$(1)' $(QUIET); fi
export MPLBACKEND ?= agg

.PHONY: setup figures render test lab lint licences clean help

help:
	@echo "make figures   run every notebook on the bundled sample; figures and tables go to figures/sample/ (07: figures/real/)"
	@echo "make render    make figures, then put its outputs into notebooks/*.ipynb, to be committed"
	@echo "make test      run the tests"
	@echo "make lab       open the notebooks in JupyterLab"
	@echo "make lint      ruff and mypy"
	@echo "make licences  licences of all installed packages, as a table"
	@echo "make setup     only set up .venv"
	@echo "make clean     remove .venv, runs/ and caches (figures and data stay)"

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 found. Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) --version): about 5 GB (PyTorch), some minutes the first time ..."
	@$(PYTHON) -m venv .venv || { echo "python -m venv failed (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PIP) --upgrade pip $(QUIET)
	@$(call install,.)
	@touch $@
	@echo "Set-up done."

$(TOOLS): $(READY)
	@echo "Adding what the tests and checks need ..."
	@$(call install,.[test])
	@touch $@

setup: $(READY)

figures: $(READY)
	@[ -s data/clip-scores/things_vith14.npz ] || .venv/bin/bsap data get clip-scores >/dev/null 2>&1 || echo "Real CLIP scores are not here: 07_real_scores is left out, and 01 and 05 go without."
	.venv/bin/bsap run --all --params notebooks/params/sample.yaml
	@if [ -s data/clip-scores/things_vith14.npz ]; then .venv/bin/bsap run 07_real_scores --name real; fi
	@.venv/bin/python notebooks/render.py page figures/sample figures/real
	@echo "Figures, tables and a page of all of them: figures/sample/README.md and figures/real/README.md"

render: figures
	.venv/bin/python notebooks/render.py outputs

test: $(TOOLS)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto  # one process a core, one thread each

# without MPLBACKEND, figures show in the page; by JUPYTER_PATH the kernel is this environment's, whatever else is installed
lab: $(READY)
	env -u MPLBACKEND JUPYTER_PATH="$(CURDIR)/.venv/share/jupyter:$$JUPYTER_PATH" \
	 "$(CURDIR)/.venv/bin/python" -m jupyterlab --notebook-dir=. notebooks/00_explore.ipynb

lint: $(TOOLS)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

licences: $(TOOLS)
	@.venv/bin/python -m piplicenses --order license --format markdown --with-system

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
