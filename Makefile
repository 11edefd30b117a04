# make demo and make test each create the environment they need in .venv, from any Python 3.10+, and reuse it.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
MINUTES ?= 6
OUT ?= bench/results
REPORT_NEEDS = torch, triton, timm, einops, safetensors, yaml, tqdm, hypothesis, pytest
REPORT_TESTS = tests/kernels/test_cuda_paths.py tests/kernels/test_layer_norm.py tests/serving/test_graphs.py
KERNEL_TESTS = PYTHONPATH=$(TOOLS) OMP_NUM_THREADS=1
KERNEL_FILES = $(addprefix tests/kernels/test_,$(addsuffix .py,layer_norm linear norm_linear batch_norm))
# Left out are a test that pretends to a GPU, whose driver PyTorch 2.9 asks for, one of a folder that timm cannot read
# before 1.0.29, and the widest norms, which take most of the time.
OLDEST_TESTS = tests/encoders tests/models tests/kernels/test_layer_norm.py tests/kernels/test_batch_norm_reference.py \
	--deselect tests/kernels/test_layer_norm.py::test_float64_on_a_gpu_takes_the_reference \
	--deselect tests/kernels/test_layer_norm.py::test_widths_of_real_encoders \
	--deselect tests/models/test_hyperclip_encoders.py::test_batch_norm_encoder_from_names_to_predictions
BYTE_FILES = $(KERNEL_FILES:.py=_bytes.py)

.PHONY: demo test quick test-oldest types test-kernels mutate gpu-report docs lint clean

demo: $(VENV)/demo.stamp
	$(VENV)/bin/hyperclip demo

test: $(VENV)/test.stamp lint types
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

# For work in progress: one case of every test that is not slow, with fewer examples of hypothesis.
quick: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 HYPERCLIP_HYPOTHESIS=quick $(RUN) -m pytest -n 2 --dist worksteal -m quick --durations 5

# Encoders, models and kernels with the oldest releases that setup.py allows, in an environment of their own.
test-oldest:
	$(MAKE) .venv-oldest/oldest.stamp VENV=.venv-oldest PIP_OPTIONS='--constraint tests/oldest.txt'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 -m "not slow" $(OLDEST_TESTS)

# The compiled kernels, executed on the CPU, and the guarded interpreter: TOOLS is a folder with ptxsim and interp_guard.
test-kernels: $(VENV)/test.stamp
	$(KERNEL_TESTS) HYPERCLIP_PTXSIM=sm_80 $(RUN) -m pytest -n 2 $(KERNEL_FILES)
	$(KERNEL_TESTS) HYPERCLIP_PTXSIM=sm_90 $(RUN) -m pytest -n 2 $(KERNEL_FILES)
	$(KERNEL_TESTS) HYPERCLIP_PTXSIM=sm_90 $(RUN) -m pytest -n 2 tests/encoders/test_hyper_block.py -k autocast
	$(KERNEL_TESTS) HYPERCLIP_GUARD=1 $(RUN) -m pytest -n 2 $(KERNEL_FILES) $(BYTE_FILES)

# Small mistakes made in the kernels, one by one, in a copy of the project: the tests must notice each. Not part of test.
mutate: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(RUN) -m tests.mutations

# Tests and the benchmark on a machine with a GPU, into OUT. Where PYTHON imports all it needs, nothing is installed, and
# no network is needed; else .venv sees the packages that PYTHON has, so that a host's own PyTorch is kept.
gpu-report:
	$(PYTHON) -c 'import $(REPORT_NEEDS)' || $(MAKE) $(VENV)/report.stamp VENV_OPTIONS=--system-site-packages
	PYTHONPATH=. $$($(PYTHON) -c 'import $(REPORT_NEEDS)' 2>/dev/null && echo $(PYTHON) || echo $(RUN)) -u \
		-m hyperclip_fast.bench.gpu_report --minutes $(MINUTES) --out $(OUT) --tests $(REPORT_TESTS)

# The documentation as a site, in site/; a broken link or reference fails.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy sees the package as it is installed: a folder of links, with kernels/ and bench/ in the package. user_program.py
# stands beside it, as a program of somebody who installed the package.
types: $(VENV)/test.stamp
	rm -rf build/types
	mkdir -p build/types/hyperclip_fast
	ln -s $(CURDIR)/hyperclip_fast/* $(CURDIR)/kernels $(CURDIR)/bench build/types/hyperclip_fast
	ln -s $(CURDIR)/tests/typing/user_program.py build/types
	cd build/types && $(abspath $(RUN)) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir ../mypy \
		-p hyperclip_fast -m user_program

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hyperclip_fast needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV_OPTIONS) $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/%.stamp: setup.py pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet $(PIP_OPTIONS) --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist site *.egg-info
