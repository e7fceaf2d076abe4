# make help lists the commands, from the comments behind ##.

PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.installed
SERVICES := $(VENV)/.services
UNFIT := $(word 2,$(CURDIR))$(findstring python3,$(CURDIR))

SWEEP ?= smoke
ON ?= local
PORT ?= 5000
OPTIONS := SWEEP ON PORT JOBS PROFILE WAIT BUDGET DRY_RUN RUN TORCH BASE PUSH REGISTRY DATA FRESH TRIAL ARGS PYTHON3
OPTIONS += $(addprefix DVQ_,STORE CACHE DEVICE RECORD FUSE LOCKS KILLS COMMIT TEST_CIFAR10)
GIVEN := $(foreach word,$(subst \ ,_,$(MAKEOVERRIDES)),$(if $(findstring =,$(word)),$(firstword $(subst =, ,$(word)))))
$(foreach word,$(filter-out $(OPTIONS) MLFLOW_% AWS_% KFP_% PIP_% -%,$(GIVEN)),$(error $(word) is no option here; they are $(OPTIONS); a variable of the environment stands before make))

# $(call yes,FRESH) is empty if it is not given, or no
yes = $(if $(filter 1 yes true on,$($1)),1,$(if $(filter-out 0 no false off,$($1)),$(error $1=$($1) is neither yes nor no: give 1 or 0)))

.DEFAULT_GOAL := help
.PHONY: help image base submit-sweep data cancel explain report results replay ui stack-up stack-down test test-services test-docker test-gpu check components release-components findings bench soak golden clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s ", $$1; n = split($$2, word, " "); at = 24; \
	  for (i = 1; i <= n; i++) { if (at + length(word[i]) > 78) { printf "\n%24s", ""; at = 24 } \
	    printf "%s ", word[i]; at += length(word[i]) + 1 } print "" }' Makefile

# exec: make passes a SIGTERM on to what it started, and a shell in between would keep it to itself
submit-sweep: $(READY) $(if $(filter docker,$(ON)),$(if $(call yes,DRY_RUN),,image)) ## run a sweep: SWEEP=smoke or path.yaml, ON=local, docker or kfp, JOBS=2 trials at a time, DATA=where CIFAR-10 is, FRESH=1 anew (what the store has of it is removed first), DRY_RUN=1 what it would take, BUDGET=hours of GPUs, PROFILE=the place's; on kfp WAIT=1 follows it
	@exec $(PYTHON) -m pipeline.submit "$(SWEEP)" --on "$(ON)" --jobs "$(JOBS)" --data "$(DATA)" --profile "$(PROFILE)" \
	  --budget "$(BUDGET)" $(if $(call yes,FRESH),--fresh) $(if $(call yes,WAIT),--wait) \
	  $(if $(call yes,DRY_RUN),--dry-run)

data: $(READY) ## bring images of your own to the store, DATA=file.npz, and say what a sweep calls them
	@$(PYTHON) -m pipeline.data "$(DATA)"

cancel: $(READY) ## end a run on kfp: RUN=its id or link
	@$(PYTHON) -m pipeline.cancel "$(RUN)" --profile "$(PROFILE)"

explain: $(READY) ## what a sweep would compute, and why; TRIAL=name: where that trial's bits go
	@$(PYTHON) -m pipeline.explain "$(SWEEP)" --trial "$(TRIAL)"

report: $(READY) ## write a sweep's report again, from the store
	@$(PYTHON) -m pipeline.report "$(SWEEP)"

results: $(READY) ## keep a sweep's finished trials on all of CIFAR-10 in pipeline/results, and make the tables and figures there anew
	@$(PYTHON) -m pipeline.results "$(SWEEP)"

replay: $(READY) ## bring MLflow up to date with a sweep, from the store
	@$(PYTHON) -m pipeline.replay "$(SWEEP)"

stack-up: $(SERVICES) ## MLflow's server, PostgreSQL and S3 as services of this machine, which sweeps then use
	@$(PYTHON) -m pipeline.stack up

stack-down: $(SERVICES) ## end them; what they keep stays
	@$(PYTHON) -m pipeline.stack down

ui: $(READY) ## MLflow's pages on the sweeps: their address, served at PORT=5000 unless a server tracks them
	@exec $(PYTHON) -m pipeline.ui --port "$(PORT)"

test: $(READY) ## every test that needs no server, Docker or GPU: five to twelve minutes
	@$(PYTHON) -m pytest -n auto --dist loadfile

test-services: $(SERVICES) ## the tests against real servers and their faults
	@$(PYTHON) -m pytest tests/services

test-gpu: $(READY) ## the tests that need a GPU; without one they fail
	@$(PYTHON) -m pytest -n 4 tests/gpu

test-docker: $(SERVICES) image ## the tests that need a Docker daemon
	@$(PYTHON) -m pytest tests/docker

image: $(READY) ## build the image, unless it is there: TORCH=2.13.0+cpu, BASE=another base, PROFILE=a cluster's, PUSH=1 REGISTRY=where
	@$(PYTHON) -m pipeline.image --profile "$(PROFILE)" $(if $(call yes,PUSH),--push)

base: ## the image's base from Debian's packages, where no registry is reached; as root
	@docker/make-base

check: $(READY) ## format, lint, types, compiled components
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m ruff check
	@$(VENV)/bin/hadolint docker/Dockerfile
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pipeline.compile --check

components: $(READY) ## compile the components to components/*/component.yaml, and their READMEs' tables
	@$(PYTHON) -m pipeline.compile

release-components: $(READY) ## record what the components take and give, at a release
	@$(PYTHON) -m pipeline.compile --release

findings: $(READY) ## the paper's findings in miniature: 36 small trials with seeds and error bars
	@$(MAKE) --no-print-directory submit-sweep SWEEP=findings
	@$(if $(call yes,DRY_RUN)$(if $(call yes,WAIT),,$(filter kfp,$(ON))),:,$(PYTHON) -m pipeline.findings)

bench: $(SERVICES) ## speed against plain versions: training (ARGS="--full", or "--device cuda"), S3, tracking, the image
	@$(PYTHON) tests/bench/training.py $(ARGS)
	@$(PYTHON) tests/bench/store.py
	@$(PYTHON) tests/bench/tracking.py
	@! docker info >/dev/null 2>&1 || $(PYTHON) tests/bench/image.py

soak: $(READY) ## training killed 200 times, compared with training that was not: 3 minutes
	@DVQ_KILLS=200 $(PYTHON) -m pytest tests/dvq/test_resume.py -k killed

golden: $(READY) ## write the golden loss curves again: after raising dvq.NUMERICS, or for a new estimator
	@$(PYTHON) -m tests.dvq.test_golden

clean: ## remove what make installed and the caches; outputs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Torch comes first and by itself, for its size: pip shows how far the download is. An interrupted set-up leaves no
# stamp and is begun again; a changed lock only brings what is there up to date.
$(READY): requirements.lock pyproject.toml
	@$(if $(UNFIT),echo "error: kfp's local runner breaks on a space or python3 in the path of a project: move it" >&2; exit 2)
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed; name one, make PYTHON3=/path/to/python" >&2; exit 2; }
	@$(PYTHON3) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON3) has no venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@test -e $@ || $(PYTHON3) -m venv --clear $(VENV)
	@rm -f $@
	@echo "installing into $(VENV): a few minutes, once"
	@$(PYTHON) -m pip --disable-pip-version-check install "$$(grep '^torch==' requirements.lock)"
	@$(PYTHON) -m pip --disable-pip-version-check -qq install -r requirements.lock
	@$(PYTHON) -m pip --disable-pip-version-check -qq install --no-deps --editable .
	@touch $@

$(SERVICES): requirements-services.lock $(READY)
	@echo "installing the servers into $(VENV)"
	@$(PYTHON) -m pip --disable-pip-version-check -qq install -r requirements-services.lock
	@touch $@
