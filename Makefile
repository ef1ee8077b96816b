# make demo | make test on a fresh machine (Python >= 3.11, a C++ compiler, make) do all the set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo-results
JOBS ?= 2

.PHONY: help install demo test slow sweep fuzz sanitize check lint format wheel smoke bench widths xrays clean

help:  ## Show these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /	/' | expand -t 10

install: $(VENV)/ready  ## Create .venv and build pyprune into it, editable

$(VENV)/ready: pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt --group dev -e .
	touch $@

demo: install  ## Train on real digits, prune, and leave the results in demo-results/
	$(BIN)/pyprune demo --out $(DEMO)

# One thread each: on tensors this small OpenMP's threads cost more than they bring, and much more on a busy machine.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test: install  ## The quick tests, in two processes (JOBS=8 for eight)
	$(PYTEST)

slow: install  ## The slow tests, without the sweeps
	$(PYTEST) -m "slow and not gpu and not sweep" --ignore=tests/ops

sweep: install  ## Every kernel on every family and size, threads, children, memory; thousands of networks: 40 minutes
	$(PYTEST) -m "slow and not gpu" tests/ops
	$(PYTEST) -m "slow and sweep"

fuzz: install  ## Fuzz the reader of slim folders for a minute (FUZZ_SECONDS=600 for ten)
	$(BIN)/python -m pip install -q -c constraints.txt "atheris>=3.0"
	mkdir -p build/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python tests/hostile/fuzz_slim.py -max_total_time=$(or $(FUZZ_SECONDS),60) -artifact_prefix=build/fuzz/

sanitize: install  ## The tests of the ops under Address-, UndefinedBehavior- and ThreadSanitizer (needs g++ and cmake)
	for kind in address undefined thread; do PATH=$(abspath $(BIN)):$$PATH tests/sanitize.sh $$kind -q || exit 1; done

lint: install  ## ruff, mypy --strict, clang-format: report only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -type f)

format: install  ## Format Python and C++ in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -type f)

wheel: install  ## Build the wheel into dist/, with build isolation
	rm -rf dist
	$(BIN)/python -m build -q --wheel

smoke: wheel  ## Try the wheel in a clean environment, and its slim folders in one without pyprune
	rm -rf build/smoke build/slim && $(PYTHON) -m venv build/smoke && $(PYTHON) -m venv build/slim
	build/smoke/bin/python -m pip install -q -c constraints.txt dist/*.whl
	build/slim/bin/python -m pip install -q -c constraints.txt torch safetensors
	cd build/smoke && bin/python -W error -P ../../tests/smoke.py
	cd build/smoke && ../slim/bin/python -P ../../tests/smoke_slim.py vgg_digits resnet20

check: lint smoke slow benchcheck test  ## Everything that CI runs

bench: install  ## The benchmarks, peers in the same groups
	$(BIN)/python -m pytest benchmarks -o addopts="" --benchmark-only --benchmark-group-by=group

benchcheck: install  ## Run every benchmark once, for its assertions only
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q benchmarks -o addopts="" --benchmark-disable

# Real data that is not part of the project: PYPRUNE_DATA is a folder with CIFAR-10 as JPEG and pretrained ResNets.
REAL_DATA = npz:$(PYPRUNE_DATA)/cifar10_train_jpegbytes.npz,$(PYPRUNE_DATA)/cifar10_test_jpegbytes.npz
REAL = $(BIN)/pyprune prune --data "$(REAL_DATA)" --normalise imagenet --steps 200

resnet20: install  ## Prune a pretrained ResNet-20 by CRank on real CIFAR-10 (PYPRUNE_DATA), in minutes
	$(REAL) --arch resnet20 --weights $(PYPRUNE_DATA)/cifar10_resnet20-12fca82f.safetensors --out runs/resnet20-crank

RESNET56 = --arch resnet56 --weights $(PYPRUNE_DATA)/cifar10_resnet56_jpegadapted_200steps.safetensors
resnet56: install  ## The same for ResNet-56, and HRank at CRank's rates
	$(REAL) $(RESNET56) --out runs/resnet56-crank
	$(REAL) $(RESNET56) --method hrank --rates runs/resnet56-crank/plan.json --out runs/resnet56-hrank

widths: install  ## Narrow a network on real digits by the redundancy of its kernels; results in width-results/
	$(BIN)/pyprune widths --arch vgg_digits --epochs 8 --lr 0.05 --budget 36 --out width-results

XRAYS = npz:$(PYPRUNE_DATA)/cxr_pneumonia_224_jpegbytes.npz
xrays: install  ## The same for ResNet-50 on 1,200 chest X-rays of 64x64 (PYPRUNE_DATA): half an hour, goes on after a stop
	$(BIN)/pyprune widths --arch resnet50 --set conv_bias=true --data $(XRAYS) --size 64 --channels 1 --images 1200 \
	  --batch 32 --epochs 15 --lr 0.01 --runs 3 --budget 15 --tolerance 0.02 --shrink 0.35 --out runs/xrays

clean:  ## Remove what was built
	rm -rf build dist $(VENV) $(DEMO)
