# Works on a machine with Python >= 3.10, pip and make; safe to repeat, sets up once.
#   make demo    the whole way on simulated images -> runs/demo/report.html, runs/demo/results.json
#   make test    every test     make test-fast    without the slow ones     make lint    style and types
#   make release RUN=runs/cells NAME=cells LICENSE=apache-2.0    an evaluated run's networks -> release/cells{,-<channel>}
#   make gpu     on a machine with a GPU: its tests, then how fast it is (GPU="--device cpu --small" without one)
#   make test-oldest    the fast tests with the oldest versions that setup.cfg promises, in an environment of their own
#
# torch is pinned for development; another build, such as a CUDA or CPU wheel index, is one variable away:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
LAUNCH := $(BIN)/accelerate launch --quiet --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: setup demo release test test-fast test-oldest gpu lint clean-demo

setup: $(READY)

$(READY): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; name one with 'make PYTHON=python3.11 ...'."; exit 2; }
	@echo "Setting up $(VENV): $(TORCH), then this project and its test tools (some minutes, once) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
		|| { $(PYTHON) -m pip install --quiet --user virtualenv && $(PYTHON) -m virtualenv --quiet $(VENV); }
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[dev]'
	@touch $(READY)
	@echo "$(VENV) is ready."

demo: $(READY)
	@echo "1/4 Training: simulates a small screen if there is none, then one network per channel."
	@$(LAUNCH) train_accelerate.py --preset demo --resume
	@echo "2/4 Profiles of every field, by the trained and an untrained network and by intensity statistics."
	@$(BIN)/wsdino-extract runs/demo
	@echo "3/4 Evaluation."
	@$(BIN)/wsdino-evaluate runs/demo
	@echo "4/4 Report."
	@$(BIN)/wsdino-report runs/demo
	@echo "Done: open runs/demo/report.html; the numbers are in runs/demo/results.json."

DTYPE ?= float16

release: $(READY)
	@test -n "$(RUN)" -a -n "$(NAME)" -a -n "$(LICENSE)" \
		|| { echo "Name them: make release RUN=<run folder> NAME=<name> LICENSE=<licence of the weights>"; exit 2; }
	@$(BIN)/wsdino-push $(RUN) --dry_run release --namespace release --parts models --name $(NAME) \
		--license $(LICENSE) --weights_dtype $(DTYPE)

test: lint
	@echo "Every test on two processes; the ten slowest are listed at the end."
	@$(PYTEST) --durations=10

test-fast: $(READY)
	@$(PYTEST) -m "not slow"

gpu: $(READY)
	@$(BIN)/python -m pytest -q tests/test_gpu.py -m "not slow"
	@$(BIN)/python -m benchmarks.gpu $(GPU)

OLDEST := .venv-oldest
OLDEST_PIP := $(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --cache-dir $(OLDEST)/.pip-cache

$(OLDEST)/.ready: setup.cfg tests/oldest_requirements.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; name one with 'make PYTHON=python3.11 ...'."; exit 2; }
	@echo "Setting up $(OLDEST) with the oldest versions that setup.cfg promises (some minutes, once) ..."
	@test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST) \
		|| { $(PYTHON) -m pip install --quiet --user virtualenv && $(PYTHON) -m virtualenv --quiet $(OLDEST); }
	@$(PYTHON) tests/oldest_requirements.py > $(OLDEST)/oldest.txt
	@$(OLDEST_PIP) $(TORCH)
	@$(OLDEST_PIP) --requirement $(OLDEST)/oldest.txt
	@$(OLDEST_PIP) --no-deps --editable .
	@touch $@

test-oldest: $(OLDEST)/.ready
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" -p no:cacheprovider

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean-demo:
	@rm -rf runs/demo data/simulated_demo data/simulated_demo_raw
	@echo "Removed the demo's run and its simulated screen."
