# Every target makes what it needs, in .venv, and is quick the second time. `make` alone lists them.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
SOURCES := pyproject.toml constraints.txt $(wildcard model/native/*.cpp model/native/*.h)

.DEFAULT_GOAL := help
.PHONY: help demo monitor test check format chaos s3 weights bench bench-model clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed  ## Draw a small collection, segment it here, show the table, a query and a picture
	$(BIN)/swath demo .demo

monitor: .venv/installed  ## Watch a demo in a real Prometheus (installed with apt where it is missing) until Ctrl-C
	$(BIN)/python -m infra.local.prometheus --target 9096 -- \
	  $(BIN)/swath demo .demo --images 200 --metrics-port 9096 --metrics-linger 5

test: .venv/developing  ## Run every test, on a real Ray and a real S3 server (installed with apt where it is missing)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

check: .venv/developing  ## Lint, check the format, the types and the dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/audit.py

format: .venv/developing  ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chaos: .venv/developing  ## Kill, starve and corrupt real runs, in the full numbers (about 30 minutes; needs root)
	CHAOS=full $(BIN)/python -m pytest tests/chaos

s3: .venv/installed  ## Run a real S3 server on loopback until Ctrl-C
	$(BIN)/python infra/local/s3_server.py

weights: .venv/installed  ## Train the demo's network again, by swath finetune (about an hour); goes on where it was cut off
	test -e .weights/scenes/labels.json || \
	  $(BIN)/python -m jobs.scenes.draw .weights/scenes --scenes 8000 --short 360:620
	$(BIN)/swath finetune .weights/scenes/images .weights/scenes/masks .weights/small --config jobs/scenes/small.yaml
	$(BIN)/swath finetune .weights/scenes/images .weights/scenes/masks .weights/large --config jobs/scenes/large.yaml \
	  --checkpoint .weights/small
	$(BIN)/python -m jobs.scenes.ship .weights/large jobs/scenes/weights

bench: .venv/benching  ## Time the road beside Ray Data, Daft and a DataLoader with transformers (about 12 minutes)
	$(BIN)/python -m jobs.bench.road $(BENCH)

bench-model: .venv/benching  ## Time the network beside transformers, ONNX Runtime and OpenVINO (about 10 minutes)
	$(BIN)/python -m jobs.bench.model $(BENCH)

clean:  ## Remove what these targets made
	rm -rf .venv .demo .weights .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info model/native/*.so

.venv/created:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/created $(SOURCES)
	$(PIP) -e .
	@touch $@

.venv/developing: .venv/created $(SOURCES)  # not behind installed: each installation builds the kernels
	$(PIP) -e '.[dev]'
	@touch .venv/installed $@

.venv/clustered: .venv/created $(SOURCES)  # what the image has: the dashboard and job server besides
	$(PIP) -e '.[cluster]'
	@touch .venv/installed $@

.venv/benching: .venv/created $(SOURCES)
	$(PIP) -e '.[bench]'
	@touch .venv/installed $@
