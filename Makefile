# Two commands: `make demo` and `make test`. Each needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
export HF_HUB_OFFLINE ?= 1

demo: .venv/installed
	.venv/bin/narrowly demo

test: check browser
	OMP_NUM_THREADS=1 .venv/bin/pytest -q -n 2 --dist loadfile

check: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache | tail -n 5

# The review page's tests drive Debian's Chromium; where it cannot be installed they are skipped.
browser:
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } \
	  >/dev/null 2>&1 || echo "no Chromium and no right to install it: its tests will be skipped"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "narrowly needs Python 3.11 or later: make PYTHON=python3.11 demo")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: browser check demo test
