# The one door: `make help` lists the targets, and CI calls only these.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= python3
export VIRTUAL_ENV := $(CURDIR)/$(VENV)

# Debian 12 packages. The first line builds and runs Drover, the second is what
# the lab's hypervisors and guests are made of, the third serves the tests.
PACKAGES := python3-venv pkg-config gcc libc6-dev libvirt-dev qemu-utils \
  libvirt-daemon-system libvirt-clients qemu-system-x86 ovmf swtpm swtpm-tools iproute2 iptables \
  syslinux syslinux-common mtools dosfstools e2fsprogs busybox-static cpio kmod xz-utils \
  postgresql btrfs-progs xfsprogs
# What `make bench` compares with, and draws with.
BENCH_PACKAGES := rsync openssh-client openssh-server libnbd-bin zstd gnuplot-nox
PROTOS   := $(shell find proto/controlplane proto/hostd -name '*.proto' | sort)
CRATE    := .cargo/config.toml $(shell find diskmover \( -name target -o -name fuzz -o -name tests \) -prune -o \( -name '*.rs' -o -name 'Cargo.*' \) -print)

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- set up -----------------------------------------------------------------

.PHONY: setup
setup: system $(VENV)/.built ## install Debian packages, the virtual environment and the Rust extension

.PHONY: system bench-system
bench-system: PACKAGES += $(BENCH_PACKAGES)
system bench-system:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -Wf '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	cargo --version 2>/dev/null | awk '{split($$2, v, "."); exit !(v[1] > 1 || v[2] >= 88)}' || missing="$$missing cargo-web rustc-web"; \
	if [ -n "$$missing" ]; then \
	  [ "$$(id -u)" = 0 ] || { echo "make: missing Debian packages:" $$missing "- run make setup as root" >&2; exit 1; }; \
	  echo "installing" $$missing; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >build-apt.log 2>&1 \
	    || { cat build-apt.log; exit 1; }; rm -f build-apt.log; \
	fi

$(VENV)/.locked: requirements.lock
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed (PYTHON=...)" >&2; exit 1; }
	@$(BIN)/pip install -q --disable-pip-version-check uv
	@$(BIN)/uv pip install -q --compile-bytecode --require-hashes -r requirements.lock
	@touch $@

$(VENV)/.built: $(VENV)/.locked pyproject.toml $(CRATE)
	@$(BIN)/maturin develop --quiet --release --locked --uv
	@touch $@

.PHONY: lock
lock: ## resolve the dependencies of pyproject.toml anew
	@$(BIN)/uv pip compile -q pyproject.toml --all-extras --generate-hashes --no-emit-index-url --no-header --python-version 3.11 -o requirements.lock

# --- use --------------------------------------------------------------------

.PHONY: demo
demo: setup ## move a real guest between real hypervisors, confirm, move again, revert
	@$(BIN)/python -m tests.lab demo

.PHONY: lab
lab: setup ## start a control plane and three hosts and leave them running
	@$(BIN)/python -m tests.lab up

.PHONY: lab-down
lab-down: ## remove every trace of the lab
	@$(BIN)/python -m tests.lab down

.PHONY: bench
bench: bench-system setup ## measure against rsync, scp, nbdcopy and qemu-img: 50 minutes (QUICK=1: under 6)
	@$(BIN)/python -m tests.bench $(if $(QUICK),--quick)

# --- check ------------------------------------------------------------------

.PHONY: test
test: setup test-rust test-python ## run everything: Rust, Python on both databases, real moves in the lab

.PHONY: test-rust
test-rust: setup
	cd diskmover && cargo clippy --locked --all-targets --quiet -- -D warnings
	cd diskmover && cargo test --locked --quiet

# Coverage is counted by flags that stable rustc has; cargo test runs the same
# targets for a fixed number of changes. What it finds stays in build/fuzz.
FUZZ_TARGETS := frame message state dirty journal zstd nbd
FUZZ_TRIPLE   = $(shell rustc -vV | sed -n 's/^host: //p')
FUZZ_FLAGS   := -Cpasses=sancov-module \
  $(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters pc-table trace-compares) \
  -Ccodegen-units=1
SECONDS_EACH ?= 60

.PHONY: fuzz
fuzz: setup ## fuzz what reads bytes of others: libFuzzer and Hypothesis (SECONDS_EACH=60; needs g++)
	cd diskmover/fuzz && RUSTFLAGS="$(FUZZ_FLAGS)" cargo build --locked --quiet --release --target $(FUZZ_TRIPLE)
	@for target in $(FUZZ_TARGETS); do \
	  mkdir -p build/fuzz/$$target; echo "fuzz: $$target"; \
	  TARGET=$$target diskmover/fuzz/target/$(FUZZ_TRIPLE)/release/diskmover-fuzz -max_total_time=$(SECONDS_EACH) -max_len=8192 \
	    -timeout=10 -rss_limit_mb=1024 -verbosity=0 -print_final_stats=1 -artifact_prefix=build/fuzz/$$target- \
	    build/fuzz/$$target diskmover/tests/fuzz/corpus/$$target; \
	done
	@echo "fuzz: qcow2 headers"; FUZZ_EXAMPLES=$$(($(SECONDS_EACH) * 300)) $(BIN)/python -m pytest -q tests/hostd/test_hostile_headers.py

# A file goes to a worker whole, in the order of tests/conftest.py. Tests wait as much
# as they compute, so there are more workers than the two processors of a small machine.
# WORKERS=0 runs everything in one process, as does .venv/bin/pytest.
WORKERS ?= 3

.PHONY: test-python
test-python: setup
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: lint
lint: setup ## formatters, linters, type checkers, layering, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code proto --exclude-path proto/google
	cd diskmover && cargo fmt --check && cargo clippy --locked --all-targets --quiet -- -D warnings

.PHONY: fmt
fmt: setup ## format everything
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/buf format -w proto --exclude-path proto/google
	cd diskmover && cargo fmt

.PHONY: proto
proto: $(VENV)/.locked ## regenerate the Python code of proto/
	@find controlplane/v1 hostd/v1 -name '*_pb2*' -delete
	@$(BIN)/python -m grpc_tools.protoc -Iproto \
	  -I"$$($(BIN)/python -c 'import grpc_tools, pathlib; print(pathlib.Path(grpc_tools.__file__).parent / "_proto")')" \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS)

.PHONY: proto-drift
proto-drift: proto ## fail when the committed generated code is not what proto/ says
	git diff --exit-code --stat -- controlplane/v1 hostd/v1

.PHONY: dist
dist: setup ## build the wheel and the source distribution
	$(BIN)/maturin build --release --locked --sdist --out dist

.PHONY: clean
clean: ## remove what builds and tests leave
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis diskmover/target diskmover/fuzz/target
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
