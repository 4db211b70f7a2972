# Each target sets up .venv first when it is missing or not made from these pins by this Python.
# PYTHON=python3.12 chooses the interpreter, ARGS="..." is handed to the command behind a target.

PYTHON ?= python3
ARGS   ?=

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
SITE  := $(VENV)/.site
# torch alone first, by the pin in requirements.txt: the largest download fails early, and nothing else picks another
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' requirements.txt)
ROOT_USER := $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help lab test mutants figures notebooks record site slides student FORCE

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# PYTHONPATH: this suite's `kernels` before another package of that name, wherever a notebook lies
lab: $(READY) ## open the notebooks in JupyterLab
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/jupyter lab $(ROOT_USER) --ip=127.0.0.1 \
		--ServerApp.root_dir="$(CURDIR)" \
		--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(ARGS)

# OMP_NUM_THREADS: two workers with two threads each would wait for one another on two cores
# PYTHONDONTWRITEBYTECODE: without compiled files each of a hundred processes would compile the suite anew
# loadfile: what a file's tests share is made once; tests/conftest.py says which files run first
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY) $(SITE) ## check style and types, run all tests
	$(BIN)/ruff check kernels figures tests  # not what a reader keeps beside them
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not serial" $(ARGS) \
		|| test $$? = 5  # 5: ARGS chose none of these
	$(BIN)/python -m pytest -m serial $(ARGS) || test $$? = 5

mutants: $(READY) ## plant known faults one at a time, list those that no test notices
	$(BIN)/python -m tests.mutants $(ARGS)

figures: $(READY) ## redraw every figure from data/
	$(BIN)/python -m figures $(ARGS)

notebooks: $(READY) ## execute every notebook and keep its outputs
	$(BIN)/python -m kernels notebooks run all $(ARGS)

record: $(READY) ## measure this machine into data/
	$(BIN)/python -m kernels record --out data $(ARGS)

site: $(SITE) ## build the static site into build/site/html, with ARGS="--address URL" of your repository
	$(BIN)/python -m kernels site $(ARGS)

slides: $(SITE) ## make HTML decks of notebooks 00 to 05 in build/slides
	$(BIN)/python -m kernels slides $(ARGS)

student: $(READY) ## copy the notebooks without solutions into build/student
	$(BIN)/python -m kernels student $(ARGS)

# The stamp holds what .venv was made from, whole: times change with a checkout or a copy, and a content may not.
# The Python is the caller's where one is named, else the one that made .venv.
made_from = { cat requirements.txt pyproject.toml; $(1) -V; } 2>&1
ifneq ($(shell $(call made_from,$(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))) | cmp -s - $(READY) 2>/dev/null || echo other),)
$(READY): FORCE
endif

# The stamp comes last, so an interrupted set-up is taken up again.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; '$(PYTHON)' is: $$($(PYTHON) -V 2>&1)." \
		"Name another one, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@rm -f $@
	@test "$$($(BIN)/python -V 2>&1)" = "$$($(PYTHON) -V 2>&1)" || rm -rf $(VENV)
	@echo "Setting up $(VENV): some minutes and, for an NVIDIA GPU, some gigabytes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[test]"
	$(BIN)/jupyter labextension disable --level=sys_prefix "@jupyterlab/apputils-extension:announcements"
	@$(call made_from,$(BIN)/python) > $@

# What the site, the slides and their tests need; a reader of the notebooks needs none of it.
$(SITE): $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[site]"
	@cp $(READY) $@
