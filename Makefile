# `make run` and `make test` are each complete on their own: they create .venv and install what they need.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: run test check changed test-lowest test-kernels test-serve lint docs clean

run: .venv/run
	@echo "Building the tiny model's engines, 5 MB in artifacts/ (nothing to build when they are there), then asking:"
	$(BIN)/python run.py --model tiny --image docs/digits.png --prompt "What digits are in the image?"

# A worker that crashes ends the run and its test is named: one started anew may wait forever (pytest-xdist #1378).
# TESTS chooses some of them, and takes options: TESTS="--no-onednn-packing tests/runtime" is a CPU without AVX-512.
test: .venv/test .venv/vocabulary
	$(BIN)/python -m pytest --numprocesses logical --max-worker-restart 0 --dist loadfile \
		--no-loadscope-reorder $(TESTS)

# The oldest releases that pyproject.toml allows, in a virtual environment of their own, on Python 3.11. pip takes PyTorch
# for CUDA unless that for the CPU is there before: python3 -m venv .venv/lowest && .venv/lowest/bin/pip install
# torch==2.13.0 torchvision==0.28.0 --index-url https://download.pytorch.org/whl/cpu
test-lowest: .venv/lowest/installed
	.venv/lowest/bin/python -m pytest --numprocesses logical --max-worker-restart 0 --dist loadfile tests/test_requirements.py \
		tests/export/test_graphs.py tests/export/test_onnxruntime.py tests/qwen2vl_trt/test_prompts.py \
		tests/qwen2vl_trt/test_hub.py tests/engines/test_inspect.py tests/batch/test_inputs.py \
		tests/runtime/features/test_store.py tests/runtime/inputs/test_images.py \
		tests/runtime/preprocessing/test_preprocessor.py

# Triton's kernels, on the CPU. Triton lies apart: PyTorch for CUDA brings the version that it needs, and
# beside a PyTorch for the CPU this one writes to stderr whenever a process ends.
test-kernels: .venv/test .venv/kernels
	PYTHONPATH=.venv/kernels $(BIN)/python -m pytest --numprocesses logical --max-worker-restart 0 \
		tests/runtime/preprocessing/test_triton_writer.py tests/runtime/test_triton_sampler.py

# The server under load and fuzzing tools, in virtual environments of their own, for evalscope and guidellm ask for different
# releases of datasets: 5 minutes, 3 GB. For PyTorch's build for a CPU see test-lowest.
test-serve: .venv/test .venv/tools/installed .venv/evalscope/installed
	SERVING_TOOLS=.venv/tools/bin:.venv/evalscope/bin $(BIN)/python -m pytest tests/serving/test_clients.py

# The fast loop: lint, types, the pages, and the tests of what git says has changed since BASE (make check BASE=main).
BASE ?= HEAD
check: .venv/test
	$(MAKE) --jobs 2 lint changed

changed: .venv/test
	$(BIN)/python -m pytest $$($(BIN)/python tests/changed.py $(BASE))

# docs/reference, from the code; tests/test_docs.py compares it.
docs: .venv/test
	$(BIN)/python docs/generate.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The test extra brings everything that a run needs, so a run after a test installs nothing.
.venv/run: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv: 1.4 GB and 2 minutes besides the download with PyTorch for a CPU (README: Install), more for CUDA"
	test .venv/test -nt pyproject.toml -a .venv/test -nt constraints.txt || $(INSTALL) .
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing the test extra into .venv: 2.6 GB with PyTorch for a CPU (README: Install), more for CUDA"
	$(INSTALL) ".[test]"
	touch $@

.venv/lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv/lowest
	.venv/lowest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt --editable ".[test]"
	touch $@

.venv/kernels: | .venv/bin/python
	rm -rf $@.part
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==3.9.0
	mv $@.part $@

# The vocabulary of the published tokenizer, for tests/published; the package is not imported, its dependencies are many.
.venv/vocabulary: | .venv/bin/python
	rm -rf $@.part
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@.part dashscope==2.0.2
	mv $@.part $@

.venv/tools/installed .venv/evalscope/installed: | .venv/bin/python
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 $(PACKAGES)
	touch $@

.venv/tools/installed: PACKAGES := "guidellm[recommended]==0.8.1" schemathesis==4.32.5 locust==2.47.0
.venv/evalscope/installed: PACKAGES := "evalscope[perf]==1.14.1"

clean:
	rm -rf .venv artifacts build *.egg-info
