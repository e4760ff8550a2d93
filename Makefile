# Every target does its own set-up and can be run again at any time.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo check test test-vllm coverage lint lint-protos protos k8s bench bench-experts bench-peers fuzz soak clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard moeserve/kernels/csrc/*)
	@echo "==> virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> pinned dependencies (CPU torch; some minutes the first time)"
	@$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt "setuptools>=77" wheel torch
	@$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@$(BIN)/python -m compileall -q moeserve tests
	@touch $(STAMP)
	@echo "==> ready"

demo: setup
	@$(BIN)/python examples/demo.py

# Tests run in two processes, each with two threads of torch; those with Ray share one of the processes.
SIDE_BY_SIDE := -n 2 --dist loadgroup
# Some of every room: what takes long, or starts other programs, is left to `make test`.
FAST := $(filter-out tests/test_dispatch.py tests/test_rows_that_count.py,$(wildcard tests/test_*.py)) $(addprefix tests/,config control host \
	page placement wire checkpoints/test_families.py checkpoints/test_fingerprint.py checkpoints/test_native.py checkpoints/test_quantised.py \
	checkpoints/test_refused_settings.py checkpoints/test_swapped.py cli/test_ping.py cli/test_top.py client/test_arguments.py \
	cluster/test_folders.py compat/test_load.py compat/test_tables.py experts/test_activations.py experts/test_choice.py \
	frontend/test_admission.py frontend/test_batcher.py frontend/test_copies.py frontend/test_health.py frontend/test_hedges.py \
	frontend/test_policy.py frontend/test_views.py gating/test_capacity.py gating/test_concepts.py gating/test_in_a_layer.py gating/test_losses.py \
	gating/test_newer_gates.py gating/test_noise.py gating/test_plugin.py gating/test_route.py gating/test_routings.py inference/test_requests.py inference/test_statistics.py k8s/test_references.py \
	server/test_forward.py server/test_lifecycle.py server/test_refusals.py server/test_stream.py service/test_admin.py service/test_stats.py \
	simulate/test_calls.py transport/test_channel.py transport/test_endpoints.py transport/test_memory.py transport/test_peer_death.py \
	transport/test_pool.py transport/test_strangers_tcp.py transport/test_strangers_unix.py transport/test_wire.py)

check: lint
	@$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "not ray and not slow" $(FAST)

test: setup
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# vLLM has pins of its own, so it gets an environment of its own, of some 900 MB of wheels.
VLLM := .venv-vllm

test-vllm: setup $(VLLM)/.ready
	@MOESERVE_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/vllm

$(VLLM)/.ready: pyproject.toml tests/vllm/requirements.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/pip install --disable-pip-version-check --no-deps --requirement tests/vllm/requirements.txt
	@$(VLLM)/bin/pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(VLLM)/.ready

coverage: setup
	@$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) --cov=moeserve --cov-report=term:skip-covered

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

# Whether protos/ are well written, and whether they break clients of the last release; needs npm.
lint-protos:
	@.ci/protos

protos: setup
	@$(BIN)/python -m grpc_tools.protoc --proto_path=protos --python_out=. --pyi_out=. --grpc_python_out=. protos/moeserve/v1/*.proto
	@$(BIN)/python -m grpc_tools.protoc --proto_path=protos --pyi_out=moeserve/v1 --descriptor_set_out=moeserve/v1/inference/open_inference.binpb \
		protos/inference/open_inference.proto
	@$(BIN)/python -m tests.support.wire_page

# kustomize reads nothing outside its folder, so what deploy/ says of dashboard and alerts is copied.
k8s:
	@cp deploy/grafana/dashboards/moeserve.json k8s/components/monitoring/dashboard.json
	@sed -i '/^spec:/q' k8s/components/monitoring/rules.yaml
	@sed -n '/^groups:/,$$p' deploy/prometheus/alerts.yml | sed 's/^./  &/' >> k8s/components/monitoring/rules.yaml

bench: setup
	@$(BIN)/python benchmarks/bench_forward.py

bench-experts: setup
	@$(BIN)/python benchmarks/bench_experts.py

# Each peer has an environment of its own; hivemind builds with the setuptools of its time.
.venv-%/.ready: benchmarks/peers/%.txt constraints.txt
	@echo "==> environment of a peer in $(@D)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --disable-pip-version-check "setuptools<81" wheel "$$(grep ^torch== constraints.txt)"
	@$(@D)/bin/pip install --disable-pip-version-check --no-build-isolation -r $<
	@touch $@

bench-peers: setup .venv-hivemind/.ready .venv-ray/.ready
	@$(BIN)/python benchmarks/bench_peers.py --hivemind .venv-hivemind/bin/python --ray .venv-ray/bin/python \
		--plot docs/images/peers.png

# A hundred thousand hostile messages; twenty minutes of mixed load.
fuzz: setup
	@$(BIN)/python benchmarks/bench_fuzz.py

soak: setup
	@$(BIN)/python benchmarks/bench_soak.py

clean:
	rm -rf $(VENV) .venv-* build dist moeserve/kernels/*.so *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
