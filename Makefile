# Every target does its own set-up and can be run again at any time.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo check test coverage lint protos k8s bench bench-experts clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard moeserve/kernels/csrc/*)
	@echo "==> virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> pinned dependencies (CPU torch; some minutes the first time)"
	@$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt "setuptools>=77" wheel torch
	@$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $(STAMP)
	@echo "==> ready"

demo: setup
	@$(BIN)/python examples/demo.py

# Lint, and tests of every kind that start no service of their own; everything is `make test`.
check: lint
	@$(BIN)/python -m pytest -q -m "not ray and not slow" tests/config tests/control tests/frontend tests/gating tests/host tests/placement tests/transport tests/wire

test: setup
	@$(BIN)/python -m pytest

coverage: setup
	@$(BIN)/python -m pytest -q --cov=moeserve --cov-report=term:skip-covered

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

protos: setup
	@$(BIN)/python -m grpc_tools.protoc --proto_path=protos --python_out=. --pyi_out=. --grpc_python_out=. protos/moeserve/v1/*.proto

# kustomize reads nothing outside its folder, so what deploy/ says of dashboard and alerts is copied.
k8s:
	@cp deploy/grafana/dashboards/moeserve.json k8s/components/monitoring/dashboard.json
	@sed -i '/^spec:/q' k8s/components/monitoring/rules.yaml
	@sed -n '/^groups:/,$$p' deploy/prometheus/alerts.yml | sed 's/^./  &/' >> k8s/components/monitoring/rules.yaml

bench: setup
	@$(BIN)/python benchmarks/bench_forward.py

bench-experts: setup
	@$(BIN)/python benchmarks/bench_experts.py

clean:
	rm -rf $(VENV) build dist moeserve/kernels/*.so *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
