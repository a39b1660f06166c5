# make generate PROMPT="ankle boot"   installs what is needed (once) and writes ankle-boot-seed0.png
# make test | quick | lint            the test run | without the slow tests | ruff and pyright
# make docs                           the documentation site, build/docs/index.html
#
# Needs Python >= 3.11 with venv and pip, git and make. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PROMPT ?= ankle boot
ARGS ?=
export PROMPT

.PHONY: generate install install-test install-docs test quick lint law docs clean

generate: $(VENV)/.installed
	@$(VENV)/bin/sfumato generate "$$PROMPT" $(ARGS)

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test
install-docs: $(VENV)/.installed-docs

# The stamps are newer than what they were made from only if every step went well.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing sfumato into $(VENV) (once; PyTorch is large)"
	@$(PYTHON) -c 'import sys; sys.exit("sfumato needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": name another with PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing the test tools into $(VENV) (once)"
	@$(PIP) -e '.[test]'
# k-diffusion is an oracle for samplers. Only one of its files is imported, so its large dependencies are left out.
	@$(PIP) --no-deps k-diffusion==0.1.1.post1 || echo "without k-diffusion: the tests that compare with it will be skipped"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "installing the documentation tools into $(VENV) (once)"
	@$(PIP) -e '.[docs]'
	@touch $@

# Two workers, one thread each: oversubscribed OpenMP is several times slower. Files in their order: the longest, tests/contracts/test_arithmetic.py,
# is then among the first, and neither worker ends alone with it.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --no-header -rs

test: $(VENV)/.installed-test
	@$(PYTEST) $(ARGS)

quick: $(VENV)/.installed-test
	@$(PYTEST) -m "not slow" $(ARGS)

lint: $(VENV)/.installed-test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

law: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --no-header -q tests/contracts/test_import_law.py

# Strict: a warning fails the build. -E reads every page again, since a warning of an unchanged page would not come back.
docs: $(VENV)/.installed-docs
	@$(VENV)/bin/python -m sphinx -E -W --keep-going -q -b html docs build/docs
	@echo build/docs/index.html

clean:
	rm -rf $(VENV) build dist docs/api .pytest_cache .ruff_cache .hypothesis src/*.egg-info
