# make demo | test | serve | lint | types | clean ; the first call sets the machine up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
READY := $(VENV)/.ready

.PHONY: demo test serve lint types clean

demo: $(READY)
	$(BIN)/python -m serve_graph demo --output demo_out

# Tests with a cluster mostly wait: others run beside them, and yield to them. They are done first:
# the last third of the others follows on them, so that no core is idle.
LAST := tests/test_[r-z]*.py
test: $(READY)
	@nice -n 10 $(PYTEST) --ignore=tests/e2e --ignore-glob='$(LAST)' & others=$$!; \
	$(PYTEST) tests/e2e; clusters=$$?; \
	$(PYTEST) $(LAST); last=$$?; \
	wait $$others && test $$clusters -eq 0 && exit $$last

serve: $(READY)
	$(BIN)/python -m serve_graph up --config configs/local.yaml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 to 3.14 is needed, this is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3") if not (3, 10) <= sys.version_info < (3, 15) else None'
	@sh tools/system_packages.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and alone: the pinned release, so that nothing else pulls another build.
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) -e '.[serve,dev]'
	@# On every core, where pip takes one; but for transformers' models, of which the tests load one.
	@# A few files are not for this Python.
	@$(BIN)/python -m compileall -qq -j 0 -x '/transformers/models/' $(VENV)/lib kestrel serve_graph || true
	@touch $(READY)

clean:
	rm -rf $(VENV) demo_out .pytest_cache .ruff_cache .mypy_cache
