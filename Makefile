# make demo       set up an environment of its own and train on real data
# make test       the test suite, in the same environment; COVERAGE=yes also holds each floor to 90 %
# make test-slow  run the pages of the manual and the notebook, and kernel templates at random configs
# make chaos     train while workers are killed, stopped, slowed down and, where this user may, cut off
# make papers     train the networks of three papers, examples/papers, on small data
# make peers      compare operators, losses and optimizers with PyTorch, in an environment with it
# make bench      measure training steps and predictions beside PyTorch, alone and in parallel, and the cost of Dask
# make gpu-check  on a machine with a GPU, in its own Python: check, time and tune kernels; WHEELS=folder of what is missing
# make cubins     compile the GPU kernels to machine code, without a GPU, in an environment with CUDA's packages
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONWARNINGS =

.PHONY: demo test test-slow test-exhaustive chaos papers lint types floors bench bench-tuner cubins peers gpu-check docs wheel clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev,docs]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/rapydli train examples/digits.py --workers 2 --run-dir runs/digits --overwrite

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(COVERAGE),--cov --cov-report=)
	$(if $(COVERAGE),$(BIN)/python tests/coverage_floors.py)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-exhaustive: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m exhaustive

chaos: $(VENV)/.installed
	$(BIN)/python benchmarks/chaos.py --faults 30 \
		$$(ip netns add rapydli-try 2>/dev/null && ip netns del rapydli-try && echo --cut)

papers: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 -m papers tests/test_papers.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

floors: $(VENV)/.installed
	$(BIN)/lint-imports

bench: .peers/.installed
	.peers/bin/python benchmarks/tracing.py
	.peers/bin/python benchmarks/conv.py --seconds 2
	.peers/bin/python benchmarks/conv.py --seconds 2 --scaling
	.peers/bin/python benchmarks/dense.py
	.peers/bin/python benchmarks/plots.py
	.peers/bin/python benchmarks/train_step.py --seconds 12 --compile
	.peers/bin/python benchmarks/inference.py --seconds 8
	.peers/bin/python benchmarks/overhead.py
	.peers/bin/python benchmarks/runtime.py
	.peers/bin/python benchmarks/readme.py

bench-tuner: $(VENV)/.installed .kernel-tuner/.installed
	$(BIN)/python benchmarks/tuner.py spaces
	$(BIN)/python benchmarks/tuner.py record
	$(BIN)/python benchmarks/tuner.py strategies
	$(BIN)/python benchmarks/tuner.py stability
	$(BIN)/python benchmarks/tuner.py step
	$(BIN)/python benchmarks/stencils.py

.kernel-tuner/.installed: benchmarks/peers.py
	$(PYTHON) benchmarks/peers.py --kernel-tuner
	touch $@

.venv-cuda/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet --upgrade pip
	.venv-cuda/bin/pip install --quiet -e '.[cuda12]' hypothesis pytest pytest-xdist
	touch $@

cubins: .venv-cuda/.installed
	.venv-cuda/bin/python -m pytest -q -n 2 --dist worksteal tests/gpu_kernels -k 'cubin or nccl'

.peers/.installed: pyproject.toml benchmarks/peers.py
	$(PYTHON) benchmarks/peers.py
	touch $@

peers: .peers/.installed
	.peers/bin/python -m pytest -q tests/peers

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS))

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict --site-dir site

wheel: $(VENV)/.installed
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .venv-cuda .peers .kernel-tuner dist site runs
