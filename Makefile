# Works on a machine with Python >= 3.10, pip and make; safe to repeat, sets up once.
#   make demo    the whole way on simulated images -> runs/demo/report.html, runs/demo/results.json
#   make demo-real CELLS=<folder>    the same on your own single cells: images, cells.csv and columns.json
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

START := --init 'release/wsdino-simulated-start-{channel}'

.PHONY: setup demo demo-real release release-code test test-fast test-oldest gpu lint clean-demo

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
	@echo "1/5 A small screen is simulated: fields of two or three cells, in the layout of BBBC021."
	@test -e data/demo/README.md || { $(BIN)/wsdino-simulate data/demo_raw --size demo --image_size 128 160 \
		&& $(BIN)/wsdino-prepare --raw data/demo_raw --resize 1 --output data/demo; }
	@echo "2/5 Training, from the start that only ever saw drawn cells: one network per channel."
	@$(LAUNCH) train_accelerate.py --preset cells --dataset data/demo $(START) --output_dir runs/demo \
		--global_crop_area 0.18 0.2 --local_crop_area 0.08 0.2 --tile_grid 2 --num_train_epochs 20 --resume
	@echo "3/5 Profiles of every field: the trained network, its start, an untrained one, intensity statistics."
	@$(BIN)/wsdino-extract runs/demo
	@echo "4/5 Evaluation."
	@$(BIN)/wsdino-evaluate runs/demo
	@echo "5/5 Report."
	@$(BIN)/wsdino-report runs/demo
	@echo "Done: open runs/demo/report.html; the numbers are in runs/demo/results.json. All images are simulated."

demo-real: $(READY)
	@test -n "$(CELLS)" -a -e "$(CELLS)/columns.json" -a -e "$(CELLS)/cells.csv" || { echo "Name a folder of single \
	cells with their table: make demo-real CELLS=<folder with images/, cells.csv and columns.json>"; exit 2; }
	@test -e data/demo_real/README.md || $(BIN)/wsdino-prepare --raw "$(CELLS)" --image_csv "$(CELLS)/cells.csv" \
		--columns "$(CELLS)/columns.json" --no_illumination --resize 1 --drop_bad --output data/demo_real
	@$(LAUNCH) train_accelerate.py --preset cells --dataset data/demo_real --subset all $(START) \
		--output_dir runs/demo_real --resume
	@$(BIN)/wsdino-extract runs/demo_real --subsets all
	@$(BIN)/wsdino-evaluate runs/demo_real
	@$(BIN)/wsdino-report runs/demo_real
	@echo "Done: open runs/demo_real/report.html; the numbers are in runs/demo_real/results.json."

DTYPE ?= float16

release: $(READY)
	@test -n "$(RUN)" -a -n "$(NAME)" -a -n "$(LICENSE)" \
		|| { echo "Name them: make release RUN=<run folder> NAME=<name> LICENSE=<licence of the weights>"; exit 2; }
	@$(BIN)/wsdino-push $(RUN) --dry_run release --namespace release --parts models --name $(NAME) \
		--license $(LICENSE) --weights_dtype $(DTYPE)

# After a change of the shipped model files; tests/test_release.py asks for it.
release-code:
	@for folder in release/*; do cp modeling_wsdino/*_wsdino.py $$folder/; done

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
	@rm -rf runs/demo data/demo data/demo_raw
	@echo "Removed the demo's run and its simulated screen."
