# Everything runs in .venv, with the versions of constraints.txt. Only Python >= 3.11, pip, make and gcc are needed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-slow lint format bench bench-hf clean

demo: $(INSTALLED)
	$(BIN)/specdec demo

test: $(INSTALLED)
	$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow --timeout 3600

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

bench-hf: $(INSTALLED)
	$(BIN)/python benchmarks/compare_hf.py

# torch comes first and by its exact version: a range could fetch several GB of CUDA packages on a machine without GPU.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
