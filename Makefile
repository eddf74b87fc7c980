# Each target sets itself up: a virtual environment in .venv, versions pinned by constraints.txt; what the tests and lint
# install in all is listed in requirements-py311.txt, so that nothing is left to resolve (two minutes of CPU time).
PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check
# modules are compiled when they are first imported, which most of what is installed never is (half of the time)
INSTALL := $(PIP) install -q --no-compile
RUN    := $(VENV)/bin/python
CORES  ?= 2
# one thread a test process: the processes are the parallelism
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=

TORCH  := $(shell grep '^torch==' constraints.txt)
TRITON := $(shell grep '^triton==' constraints.txt)
STREAMING := $(shell grep '^mosaicml-streaming==' constraints.txt)
# the list is of one Python and system: elsewhere pip resolves what constraints.txt leaves open
LISTED := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info[:2] == (3, 11) and sys.platform == "linux" else "")')

.PHONY: demo install test test-ptx test-slow test-newest test-trainers test-ray test-pairs test-pair lint format bench lock clean

demo: $(VENV)/.demo
	$(RUN) -m capacitor_rt.cli.demo --out demo-out

install: $(VENV)/.test $(VENV)/.lint

test: $(VENV)/.test
	$(TEST_ENV) $(RUN) -m pytest -n $(CORES) --dist worksteal -q --force-short-summary -m 'not slow'

# the compiled kernels executed on the CPU, every config row on every GPU: long, `make test` runs a part of it
test-ptx: $(VENV)/.test
	$(TEST_ENV) $(RUN) -m tests.ptx --all

# real sizes under the interpreter, minutes of CPU time; `make test` leaves them out
test-slow: $(VENV)/.test
	$(TEST_ENV) $(RUN) -m pytest -q -m slow

# the kernel suites once more on the other end of the Triton window
test-newest: $(VENV)/.test
	$(PYTHON) -m venv $(VENV)-newest
	$(MAKE) VENV=$(VENV)-newest $(VENV)-newest/.test
	$(VENV)-newest/bin/python -m pip install -q --no-deps 'triton>=3.6,<3.10' --upgrade
	$(TEST_ENV) $(VENV)-newest/bin/python -m pytest -n $(CORES) --dist worksteal -q --force-short-summary -m 'not slow' tests/kernels

# the exporters once more with the extra `trainers` as the index resolves it; checkouts under CAPACITOR_TRAINERS join in
test-trainers:
	test -x $(VENV)-trainers/bin/python || $(PYTHON) -m venv $(VENV)-trainers
	$(VENV)-trainers/bin/python -m pip install -q '$(TORCH)' pytest -e '.[cache,trainers]'
	$(TEST_ENV) $(VENV)-trainers/bin/python -m pytest -q tests/cache/test_export*.py

# caching on a local Ray, which takes a while to start: `make test` leaves it out
test-ray: $(VENV)/.test
	$(PIP) install -q -c $(VENV)/constraints.txt -e '.[ray]'
	$(TEST_ENV) $(RUN) -m pytest -q tests/cache/test_ray.py

# the suites that lean on torch and Triton, on every pair TORCH/TRITON: gigabytes each, so that `make test` leaves them out
PAIRS      ?= 2.10.0/3.6.0 2.11.0/3.6.0 2.12.1/3.7.1 2.13.0/3.9.0 2.14.1/3.8.0
PAIR_TESTS := tests/kernels tests/ptx tests/launcher tests/runtime tests/test_gradients.py tests/test_model.py tests/test_reference.py

test-pairs:
	set -e; for pair in $(PAIRS); do torch=$${pair%/*} triton=$${pair#*/}; \
	  $(MAKE) test-pair VENV=$(VENV)-$$torch-$$triton TORCH=torch==$$torch TRITON=triton==$$triton; done

test-pair: $(VENV)/.test
	$(TEST_ENV) $(RUN) -m pytest -n $(CORES) --dist worksteal -q --force-short-summary -m 'not slow' $(PAIR_TESTS)

# the tests' environment too: types are checked against the packages that are used
lint: $(VENV)/.test $(VENV)/.lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.lint
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.bench
	$(RUN) -m pytest bench --benchmark-only -q

# the list anew, after a change of constraints.txt or of what the tests need: run it with Python 3.11 on Linux
lock:
	rm -rf $(VENV)-lock
	$(MAKE) VENV=$(VENV)-lock LISTED= install
	{ echo "# Made by \`make lock\`: all that the tests and lint install beside torch and triton, for Python 3.11 on Linux."; \
	  $(VENV)-lock/bin/python -m pip --disable-pip-version-check list --format=freeze --exclude-editable \
	  | grep -v '^pip==\|^torch==\|^triton==\|^nvidia-\|^cuda-'; } > requirements-py311.txt
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) $(VENV)-* demo-out .pytest_cache .ruff_cache .hypothesis .benchmarks .triton_cache

# torch first, so that nothing else chooses another build of it; then our Triton over the one that torch asks for,
# because the compiled facts in the tests are those of one version
$(VENV)/.torch: constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '$(TORCH)'
	$(INSTALL) --no-deps '$(TRITON)'
	touch $@

define install
	{ grep -v '^torch==\|^triton==' constraints.txt; echo '$(TORCH)'; } > $(VENV)/constraints.txt
	$(INSTALL) -c $(VENV)/constraints.txt $(1)
	$(INSTALL) --no-deps '$(TRITON)' $(2)
	touch $@
endef

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(call install,-e '.[view]')

# streaming asks for older releases of numpy, xxhash and transformers than the others; MDS is read with these as well
$(VENV)/.test: $(VENV)/.torch pyproject.toml $(if $(LISTED),requirements-py311.txt)
ifeq ($(LISTED),)
	$(call install,-e '.[test]','$(STREAMING)')
else
	{ grep -v '^torch==\|^triton==' constraints.txt; echo '$(TORCH)'; } > $(VENV)/constraints.txt
	$(INSTALL) --no-deps -r requirements-py311.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
	touch $@
endif

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(call install,-e '.[test]')

$(VENV)/.lint: constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt ruff mypy pre-commit
	touch $@
