# make demo   few labels, many clouds without, on embedded shapes: teacher, plain and taught students, report
# make test   set-up, lint, and the whole suite
# make bench  speed, as ratios against peers measured in the same run; REPOS=folder of checkouts of the public
#             repositories and MODELNET40=folder of its clouds add the peers and the data that need them
# make test-torch TORCH=2.6.0, make test-lowest, make test-python PYTHON=python3.13   the suite on another torch, on
#             the lowest version of every dependency, on another Python, each in an environment of its own
# make sanitize   the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, or with THREAD=1 with
#             ThreadSanitizer: the ops' suite, random calls
# make exhaust  the EMD against the exact optimum on CASES=1000000 random and adversarial pairs, on all cores;
#             begun again, it goes on where it was
# make fuzz   MINUTES=10 of damaged files through every reader; begun again, it goes on where it was
# make kill   MINUTES=10 of killing every recipe and resuming it; begun again, it goes on where it was
# Every target does its own set-up in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_JOBS ?= 2
SOURCES := $(wildcard csrc/*)

# of each torch that the suite is tried on beside the newest, the torchvision that belongs to it
TORCHVISION_2.6.0 := 0.21.0
TORCHVISION_2.9.1 := 0.24.1

.PHONY: demo test test-torch test-lowest test-python sanitize bench exhaust fuzz kill lint types cuda-compile clean
.DELETE_ON_ERROR:

$(VENV)/.dependencies: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pointcmt needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision "setuptools>=77" wheel ninja
	touch $@

# csrc is built here, against the torch that was just installed
$(STAMP): $(VENV)/.dependencies setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev,tensorboard]"
	touch $@

demo: $(STAMP)
	$(BIN)/pointcmt demo

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# adapters/ imports as pointcmt.adapters; a tree of links shows mypy the package as it is installed
types: $(STAMP)
	@rm -rf build/types && mkdir -p build/types/pointcmt
	@ln -s $(CURDIR)/pointcmt/* build/types/pointcmt/ && ln -s $(CURDIR)/adapters build/types/pointcmt/adapters
	cd build/types && $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache

# the CUDA sources cannot run without a GPU, but wherever nvcc is they must compile
cuda-compile: $(STAMP)
	@if command -v nvcc >/dev/null; then \
		echo "compiling the CUDA sources"; \
		FORCE_CUDA=1 POINTCMT_REQUIRE_EXT=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-9.0} \
		$(BIN)/python setup.py --quiet build_ext --build-temp build/cuda-check --build-lib build/cuda-check; \
	else echo "no nvcc here: the CUDA sources are not compiled"; fi

# two processes of one thread each: most tests are too small for two threads
test: lint cuda-compile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile

# Everything built and installed anew in build/$(NAME), beside the newest versions in .venv: pip is held to PINS,
# the extension lies there and not in the source tree, and is compiled again when a source of it has changed.
# TESTS="tests/ops tests/methods" runs a part of the suite.
test-torch: NAME = torch-$(TORCH)
test-torch: PINS = printf 'torch==%s\ntorchvision==%s\n' $(TORCH) $(TORCHVISION_$(TORCH))
test-torch test-python: EXTRAS = dev
# the codebases that the suite compares with want newer versions of these dependencies themselves
test-lowest: EXTRAS = test,mesh,registration,tensorboard,pretrained,cluster
test-lowest: NAME = lowest
test-lowest: PINS = $(PYTHON) tests/lowest.py pyproject.toml
test-python: NAME = $(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
test-python: PINS = true
test-torch test-lowest test-python:
	@test $@ != test-torch -o -n "$(TORCHVISION_$(TORCH))" || { echo "make test-torch TORCH=2.6.0 or 2.9.1"; exit 1; }
	test -d build/$(NAME) || $(PYTHON) -m venv build/$(NAME)
	$(PINS) > build/$(NAME)/pins.txt
	build/$(NAME)/bin/python -m pip install --quiet --constraint build/$(NAME)/pins.txt torch torchvision \
		"setuptools>=77" wheel ninja
	mkdir -p build/$(NAME)/tree && find build/$(NAME)/tree -type f ! -name '*.so' -delete
	git ls-files -z | xargs -0 cp --parents -t build/$(NAME)/tree
	sha256sum build/$(NAME)/pins.txt pyproject.toml setup.py $(SOURCES) > build/$(NAME)/wanted.txt
	cmp -s build/$(NAME)/wanted.txt build/$(NAME)/installed.txt || { cd build/$(NAME)/tree && \
		POINTCMT_REQUIRE_EXT=1 ../bin/python -m pip install --quiet --no-build-isolation \
		--constraint ../pins.txt -e ".[$(EXTRAS)]" && mv ../wanted.txt ../installed.txt; }
	export POINTCMT_MODELNET40=$${POINTCMT_MODELNET40:-$(CURDIR)/../shared/data/modelnet40_ply_hdf5_1024}; \
	cd build/$(NAME)/tree; \
	OMP_NUM_THREADS=1 ../bin/python -m pytest -n $(TEST_JOBS) --dist loadfile --junitxml ../suite.xml $(TESTS); \
	code=$$?; ../bin/python -m benchmarks.versions --name $(NAME) --report ../suite.xml --tests "$(TESTS)" \
		--out $(CURDIR)/benchmarks/results/reliability/versions.json && exit $$code

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(if $(REPOS),--repos $(REPOS)) $(if $(MODELNET40),--modelnet40 $(MODELNET40))

exhaust: $(STAMP)
	$(BIN)/python -m benchmarks.exhaust $(if $(CASES),--cases $(CASES))

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.run --minutes $(or $(MINUTES),10) --out benchmarks/results/reliability/fuzz.json

kill: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kill --minutes $(or $(MINUTES),10)

sanitize: $(STAMP)
	$(BIN)/python -m benchmarks.sanitize $(if $(THREAD),--thread) $(if $(CALLS),--calls $(CALLS))

clean:
	rm -rf build $(VENV) pointcmt/*.so *.egg-info
