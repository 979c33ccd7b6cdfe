# The verbs of the project; `make help` lists them. CI calls nothing else.
.DEFAULT_GOAL := help
.PHONY: help setup run test check proto proto-check lint type fmt sim replay bench clean \
	test-torch test-jax test-vllm test-gpu test-neuron test-serve test-contracts test-clients clients \
	test-operations dashboard \
	engines-torch engines-jax engines-vllm engines-neuron

VENV ?= .venv
PY := $(VENV)/bin/python
# The first interpreter that works and is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
SETUP = @test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed (set PYTHON=...)"; exit 1; }; \
	$(PYTHON) -m deploy.setup_env --venv $(VENV)
PROTOS := $(wildcard proto/*/v1/*.proto proto/*/*/v1/*.proto)
PROTOC = $(PY) -m grpc_tools.protoc -I proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)
SEEDS ?= 1000
ARGS ?=
# Half of the tests wait for a process most of the time. A file's tests stay together: they share
# servers and models.
TEST_JOBS ?= 2
# Environments of engines for the tests lie in the checkout: they hold its code, not a release.
ENGINES_HOME := $(CURDIR)/.roundhouse
ENGINE_SETUP = ROUNDHOUSE_HOME="$(ENGINES_HOME)" $(PY) -m deploy.engine_env $(1) test
ENGINE_TEST_OF = ROUNDHOUSE_HOME="$(ENGINES_HOME)" OMP_NUM_THREADS=1 \
	"$(ENGINES_HOME)/engines/$(1)/bin/python" -m pytest tests/heavy/$(2) $(ARGS)
ENGINE_TEST = $(call ENGINE_TEST_OF,$(1),$(1))

CLIENT_TEST = OMP_NUM_THREADS=1 "$(ENGINES_HOME)/$(1)/bin/python" -m pytest $(2) $(ARGS) $(if $(ARGS),|| test $$? = 5)

help: ## Lists the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

setup: ## Makes .venv and installs everything (compiles llama.cpp once); instant when done
	$(SETUP)

run: setup ## Serves the embedded model on ports 3000 (REST) and 50051 (gRPC); ARGS="--port 8080"
	@exec $(VENV)/bin/roundhouse serve $(ARGS)

test: setup ## Runs all tests; ARGS="-k name" picks some, TEST_JOBS=0 runs one at a time
	@$(PY) -m pytest -n $(TEST_JOBS) --dist loadfile $(ARGS)

# One rule for each engine with tests of its own: engines-NAME makes its environment.
engines-torch engines-jax engines-vllm engines-neuron: engines-%: setup
	@$(call ENGINE_SETUP,$*)

test-torch: engines-torch ## Tests the torch engine in its own environment (2 GB)
	@$(call ENGINE_TEST,torch)

test-jax: engines-jax ## Tests the JAX engine in its own environment (1 GB)
	@$(call ENGINE_TEST,jax)

test-vllm: engines-vllm ## Tests the vLLM engine in its own environment (3.5 GB)
	@$(call ENGINE_TEST,vllm)

test-gpu: engines-torch engines-jax ## Tests the engines that compute on a GPU; fails without one
	@$(call ENGINE_TEST_OF,torch,gpu/test_torch.py)
	@$(call ENGINE_TEST_OF,torch,gpu/test_torch_sampling.py)
	@$(call ENGINE_TEST_OF,jax,gpu/test_jax.py)
	@$(call ENGINE_TEST_OF,jax,gpu/test_jax_sampling.py)
	@$(PY) -m pytest tests/heavy/gpu/test_llamacpp.py $(ARGS)

test-neuron: engines-neuron ## Tests Neuron's slots and buckets on XLA's CPU device (6 GB)
	@PJRT_DEVICE=CPU $(call ENGINE_TEST,neuron)

test-serve: engines-torch ## Tests two engines at once, and ranks, as users start them
	@ROUNDHOUSE_HOME="$(ENGINES_HOME)" OMP_NUM_THREADS=1 $(PY) -m pytest tests/heavy/serve $(ARGS)

test-contracts: setup ## Compares what adapters use with the packages of engines that cannot run here
	@$(PY) -m pytest tests/heavy/contracts $(ARGS)

test-operations: setup ## Tests alerts and units with promtool, Prometheus and systemd-analyze
	@$(PY) -m pytest tests/heavy/operations $(ARGS)

dashboard: setup ## Writes the Grafana dashboard anew from deploy/operations/panels.py
	@$(PY) -m deploy.operations.dashboard > deploy/operations/grafana/roundhouse.json

clients: setup
	@ROUNDHOUSE_HOME="$(ENGINES_HOME)" $(PY) -m deploy.client_env clients clients-tgi

# Two environments, as the clients' own needs exclude each other. A choice of tests may leave one
# of them without any, which pytest calls 5.
test-clients: clients ## Tests real clients (openai, anthropic, TGI's ...) against a real server (1 GB)
	@$(call CLIENT_TEST,clients,tests/heavy/clients --ignore tests/heavy/clients/tgi)
	@$(call CLIENT_TEST,clients-tgi,tests/heavy/clients/tgi)

check: ## Everything CI runs: code, simulation, tests, the suites of engines and clients (8 GB)
	@.ci/run

proto: setup ## Generates the folders named v1 from proto/
	@$(call PROTOC,.)

proto-check: setup ## Fails if the generated code is not what proto/ says
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(call PROTOC,$$out) && \
	for file in $$(cd "$$out" && find . -type f); do \
		cmp -s "$$out/$$file" "$$file" || { echo "$$file is out of date: run 'make proto'"; exit 1; }; \
	done && echo "generated code is up to date"

lint: setup ## ruff: rules and formatting
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

fmt: setup ## Formats the code and repairs what ruff can repair
	@$(PY) -m ruff check --fix . ; $(PY) -m ruff format .

type: setup ## mypy --strict
	@$(PY) -m mypy

sim: setup ## Simulates SEEDS=n worlds with faults, and checks that damaged cores are caught
	@$(PY) -m tests.sim --seeds $(SEEDS) --mutants

replay: setup ## Runs one simulated world again and prints it: SEED=n
	@test -n "$(SEED)" || { echo "say which world: make replay SEED=n"; exit 1; }
	@$(PY) -m tests.sim --replay $(SEED)

bench: ## Runs all benchmarks (about 20 minutes on an idle machine); ARGS="--quick"
	$(SETUP) llamacpp dev bench
	@$(PY) -m benchmarks $(ARGS)

clean: ## Removes what was built, the virtual environment too
	rm -rf "$(VENV)" "$(ENGINES_HOME)" build dist *.egg-info \
		.mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
