# Each target is sufficient on a fresh machine with Python 3.10+ and make: it installs into .venv what it needs.
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt

.PHONY: demo demo-gan demo-t2i study test check

demo: .venv/ready
	$(BIN)/python demo.py --seed $(SEED)

# The demo and then, from its students, R+D.
demo-gan: .venv/ready
	$(BIN)/python demo.py --seed $(SEED) --gan

# Text to image: two digits as captions say.
demo-t2i: .venv/ready
	$(BIN)/python -m lab.text_demo --seed $(SEED)

# The paper's Table 1 and ablations on digits, three seeds, hours: it continues what is there.
study: .venv/ready
	$(BIN)/python -m lab.study --out results/study

test: .venv/ready-extra
	$(MAKE) check
	$(BIN)/python -m pytest -q -rs -n auto -m slow

# Lint, types and the fast tests.
check: .venv/ready-extra
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -rs -n auto -m "not slow"

# uv installs the same packages as pip, several times faster. Compiled to bytecode once, so that no process has to.
.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(INSTALL) -r requirements.txt
	touch $@

# What the optional features need as well.
.venv/ready-extra: .venv/ready requirements-extra.txt
	$(INSTALL) -r requirements-extra.txt
	touch $@
