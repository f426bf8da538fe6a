# make demo: install, train a small ViT on the digits, convert, run; make test: install, run the suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A plain `pip install torch` brings several GB of CUDA packages on Linux; this pin takes a CPU build where one is offered.
TORCH ?= torch==2.13.0
HUGGING ?= transformers==5.23.0 diffusers==0.42.1
WORKERS ?= 2
# torchvision's wheel wants its own torch, so it and timm come without dependencies.
VISION ?= torchvision==0.28.0 timm==1.0.31

.PHONY: demo test roads docs slow lint install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[convert,cpu,demo,data,tensorboard,docs,dev]" pyyaml $(HUGGING)
	$(BIN)/python -m pip install --quiet --no-deps $(VISION)
	touch $@

demo: install
	$(BIN)/python examples/digits.py

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

roads: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "road and not slow and not gpu"

docs: install
	mkdir -p build/links/diffusionblocks
	for room in converter export runtime; do ln -sfn ../../../$$room build/links/diffusionblocks/$$room; done
	$(BIN)/python -m mkdocs build --strict
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m docs

slow: install
	$(BIN)/python -m pytest -m "slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/links/diffusionblocks
	for room in converter export runtime; do ln -sfn ../../../$$room build/links/diffusionblocks/$$room; done
	$(BIN)/mypy -p diffusionblocks.runtime -p diffusionblocks.export -p diffusionblocks.converter
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info demo
