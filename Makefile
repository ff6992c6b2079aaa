# Two commands from a fresh clone, each with all its set-up:
#   make demo    train and measure a shadow model of a real MoE model
#   make test    lint, build with warnings as errors, run all tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := CMakeLists.txt pyproject.toml $(shell find cmake cpp -type f)
# On Linux MLX needs a backend named; macOS brings its own.
BACKEND ?= $(if $(filter Linux,$(shell uname -s)),cpu,)
comma  := ,
CXX_FILES := $(shell find cpp tests/cpp benchmarks examples -name '*.cpp' -o -name '*.h' -o -name '*.inl')

# The C++ tests use its cmake and ninja.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test lint format sanitize bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/mlx-od-moe demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

sanitize: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests/test_cpp.py tests/test_prediction_queue.py tests/test_expert_store.py \
	  tests/test_thread_sanitizer.py \
	  -k 'sanitizer or cpp-address or cpp-thread' -v

bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(wildcard benchmarks/bench_*.py) --benchmark-enable --benchmark-only

clean:
	rm -rf build demo-output $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/demo.stamp: $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[$(if $(BACKEND),$(BACKEND)$(comma))plot]'
	touch $@

$(VENV)/test.stamp: $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[$(if $(BACKEND),$(BACKEND)$(comma))test,lint]' \
	  -C cmake.define.MLX_OD_MOE_WERROR=ON
	touch $@ $(VENV)/demo.stamp
