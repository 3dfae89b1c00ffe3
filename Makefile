# Nothing has to be built. Each target sets up what it needs: Debian packages (as root or through
# sudo, and it says so first), and tools in .venv, in a directory for each Python: those of .ci/lock,
# where each has its version and its hashes, so that this tree gets the same tools at any time.

PYTHON = python3
PYTEST_ARGS =
BENCH_ARGS =
MUTANTS_ARGS =
PREFIX = /usr/local
DESTDIR =

# The tests work in network namespaces. To make one, an ordinary user needs a user namespace, and
# to make that, a process must not have threads yet.
# There the user is called root, so pytest's temporary files must not meet those of the real one.
ROOTLESS = $(if $(filter 0,$(shell id -u)),,env PYTEST_DEBUG_TEMPROOT=$(CURDIR)/$(VENV) \
	unshare --user --map-root-user)

# On Debian an ordinary user's PATH has no sbin, where nft and ip are.
export PATH := $(PATH):/usr/sbin:/sbin

SCRIPTS = $(wildcard *.py .ci/lab/*.py) .ci/demo .ci/bench .ci/knockers.py .ci/mutants

# These are asked for when a recipe starts, and not before: Python may not be installed yet.
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV = .venv/$(VERSION)
SITE = $(VENV)/lib/python$(VERSION)/site-packages

help:
	@echo 'make demo    letmein from the first knock to the last, on two throwaway hosts'
	@echo 'make test    the whole test suite, and its coverage (PYTEST_ARGS="-k udp": a part of it)'
	@echo 'make matrix  make test for each Python: 3.9 to 3.13 of PATH, or PYTHONS="python3.9 ..."'
	@echo 'make soak    500 random sequences of what can happen to a firewall, some 15 minutes'
	@echo 'make fuzz    anything to every room for SECONDS=600, until something fails'
	@echo 'make bench   letmein.py beside other port knockers, 8 minutes (BENCH_ARGS=--help: parts of it)'
	@echo 'make mutants what could be wrong without a failing test, 15 minutes (MUTANTS_ARGS: a part)'
	@echo 'make lint    ruff, and mypy --strict'
	@echo 'make lock    newer tools: write .ci/lock anew, from its .in files'
	@echo 'make clean   remove what these have made'
	@echo 'make install, make uninstall    for this machine (PREFIX=/usr/local; DESTDIR=/tmp/package)'
	@echo 'PYTHON=/path/to/python3.9 behind any of these: another Python than python3'

demo: packages
	@$(PYTHON) .ci/demo

# Every process of the suite counts what it executes of letmein.py, and leaves its counts in
# `measured`. The 90 % are asked of the whole suite, not of a part.
test: tools
	@printf '%s\n' "$$COVERAGE_INI" 'data_file = $(CURDIR)/$(VENV)/measured/data' >$(VENV)/coverage.ini
	@printf '%s\n' "$$COVERAGE_START" >$(SITE)/measure_letmein.py
	@echo 'import measure_letmein' >$(SITE)/measure_letmein.pth
	@rm -rf $(VENV)/measured; mkdir $(VENV)/measured
	@COVERAGE_PROCESS_START=$(CURDIR)/$(VENV)/coverage.ini $(ROOTLESS) $(VENV)/bin/python -m pytest \
		-n 6 --dist worksteal -o cache_dir=$(VENV)/pytest test_letmein.py $(PYTEST_ARGS)
	@$(VENV)/bin/coverage combine --quiet --rcfile=$(VENV)/coverage.ini
	@$(VENV)/bin/coverage report --rcfile=$(VENV)/coverage.ini $(if $(PYTEST_ARGS),|| true,--fail-under=90)

# Each Python in turn, whatever becomes of the others. It fails if one did, or if none was found.
PYTHONS = python3.9 python3.10 python3.11 python3.12 python3.13
matrix:
	@good=; bad=; absent=; for python in $(PYTHONS); do \
		if ! command -v $$python >/dev/null; then absent="$$absent $$python"; continue; fi; \
		echo "== $$python"; \
		if $(MAKE) --no-print-directory test PYTHON=$$python; \
		then good="$$good $$python"; else bad="$$bad $$python"; fi; \
	done; \
	echo "passed:$${good:- none}; failed:$${bad:- none}; not found:$${absent:- none}"; \
	[ -n "$$good" ] && [ -z "$$bad" ]

soak: tools
	SOAK=500 $(ROOTLESS) $(VENV)/bin/python -m pytest -o cache_dir=$(VENV)/pytest test_letmein.py \
		-k TestAnything

# The same properties as in `make test`, with other examples in each round. A failure is printed
# with the example that shows it. A round takes up to a minute, and the last one is not cut short.
SECONDS = 600
fuzz: tools
	@end=$$(($$(date +%s) + $(SECONDS))); while \
		seed=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' '); echo "seed $$seed"; \
		FUZZ=10 $(ROOTLESS) $(VENV)/bin/python -m pytest -q -x -n auto -o cache_dir=$(VENV)/pytest \
			test_letmein.py -m hypothesis -k 'not TestAnything' --hypothesis-seed=$$seed || exit 1; \
		[ $$(date +%s) -lt $$end ]; do :; done

# Beside fwknop and knockd from Debian, and the Rust letmein if its programs are in PATH.
bench: bench-tools bench-packages
	$(ROOTLESS) $(VENV)-bench/bin/python .ci/bench $(BENCH_ARGS)

# MUTANTS_ARGS="'*[147]'" is a sample, of three mutants in ten: see .ci/mutants.
mutants: mutants-tools
	$(VENV)-mutants/bin/python .ci/mutants $(MUTANTS_ARGS)

# Our files are checked for the oldest Python, whichever runs. The tools that they import are of
# versions that work there (see `lock`), so mypy can read those as well.
lint: tools
	$(VENV)/bin/ruff check --isolated --cache-dir=$(VENV)/ruff --target-version=py39 \
		--line-length=100 --select=E,F,W,I,UP,B,SIM,RUF $(SCRIPTS)
	$(VENV)/bin/mypy --config-file= --cache-dir=$(VENV)/mypy --python-version=3.9 \
		--strict --scripts-are-modules $(SCRIPTS)

clean:
	rm -rf .venv .bench .hypothesis __pycache__ .ci/__pycache__ .ci/lab/__pycache__

# The module goes where Python keeps its bytecode, and two short programs import it from there: so a
# knock need not compile it anew. The configuration in /etc is the owner's, and is not touched, nor is
# a server that runs. The account comes with an installation by root for this very machine.
MODULE = $(PREFIX)/lib/letmein
UNITS = $(PREFIX)/lib/systemd/system
DOC = $(PREFIX)/share/doc/letmein
MAN = $(PREFIX)/share/man/man1
DOCUMENTS = README.md MANUAL.md RECIPES.md letmein.conf.example letmeind.conf.example nftables.conf
# While Python starts, Ctrl-C makes it print a traceback. So it waits until the first line of ours,
# where env can see to that (coreutils 8.32 and newer).
BLOCK_CTRL_C = --block-signal=INT
FROM_MODULE = import sys; sys.path.insert(0, sys.argv.pop(1)); import letmein; \
	del sys.argv[0]; sys.exit(letmein.main())

install:
	@umask 022; set -e; \
	install -d $(addprefix $(DESTDIR),$(MODULE) $(PREFIX)/bin $(PREFIX)/sbin $(UNITS) $(DOC) $(MAN)); \
	root=$$(cd '$(DESTDIR)/' && pwd -P); root=$${root%/}; \
	install -p -m 644 letmein.py "$$root$(MODULE)"; \
	install -p -m 644 $(DOCUMENTS) "$$root$(DOC)"; \
	PYTHONHASHSEED=0 $(PYTHON) -m compileall -q -f -d '$(MODULE)' "$$root$(MODULE)"; \
	python="$$($(PYTHON) -c 'import sys; print(sys.executable)') -I"; \
	! env -S $(BLOCK_CTRL_C) true 2>/dev/null || python="/usr/bin/env -S $(BLOCK_CTRL_C) $$python"; \
	for name in bin/letmein sbin/letmeind; do \
		printf '%s\n' "#!$$python" \
			'import signal, sys' \
			'if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:' \
			'    signal.signal(signal.SIGINT, signal.SIG_DFL)' \
			'signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])' \
			'signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # until main() knows' \
			'sys.path.insert(0, "$(MODULE)"); import letmein' 'sys.exit(letmein.main())' | \
			install -m 755 /dev/stdin "$$root$(PREFIX)/$$name"; \
	done; \
	$(PYTHON) -I -c "$$MAN_PAGE" "$$root$(MODULE)" | \
		install -m 644 /dev/stdin "$$root$(MAN)/letmein.1"; \
	unit=$$($(PYTHON) -I -c '$(FROM_MODULE)' \
		"$$root$(MODULE)" "$$root$(PREFIX)/bin/letmein" service systemd); \
	printf '%s\n' "$$unit" | sed "s|$$root/|/|g" | \
		install -m 644 /dev/stdin "$$root$(UNITS)/letmeind.service"; \
	if [ -z '$(DESTDIR)' ] && [ "$$(id -u)" = 0 ] && ! getent passwd letmeind >/dev/null; then \
		useradd --system --no-create-home --shell /usr/sbin/nologin letmeind; \
	fi
	@echo 'installed letmein and letmeind; next: README.md, "Server in ten minutes"'

# What a server should not be without stays: its configuration and its account.
uninstall:
	rm -rf $(addprefix $(DESTDIR),$(MODULE) $(DOC) $(UNITS)/letmeind.service)
	rm -f $(addprefix $(DESTDIR),$(PREFIX)/bin/letmein $(PREFIX)/sbin/letmeind $(MAN)/letmein.1)

.PHONY: help demo test matrix soak fuzz bench mutants lint lock clean install uninstall \
	packages test-packages bench-packages tools bench-tools mutants-tools

# `want PROGRAM PACKAGE` in a recipe below: that the program is there, or else the package is missing.
WANT = missing=; want() { command -v "$$1" >/dev/null || missing="$$missing $$2"; }; \
	want $(PYTHON) $(notdir $(PYTHON)); want nft nftables; want ip iproute2; want unshare util-linux

packages:
	@$(WANT); [ -z "$$missing" ] || sh -c "$$INSTALL" install $$missing

test-packages:
	@$(WANT); want ps procps; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing $(notdir $(PYTHON))-venv"; \
	$(PYTHON) -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")' 2>/dev/null || \
		missing="$$missing libseccomp2"; \
	[ -z "$$missing" ] || sh -c "$$INSTALL" install $$missing

# Their daemons are not enabled: Debian's packages leave that to the administrator.
bench-packages: test-packages
	@$(WANT); want fwknopd fwknop-server; want fwknop fwknop-client; want knockd knockd; \
	want iptables-nft iptables; \
	[ -z "$$missing" ] || sh -c "$$INSTALL" install $$missing || echo 'Going on without these.'

tools: test-packages
	@sh -ec "$$LOCKED_VENV" venv $(VERSION)

bench-tools: test-packages
	@sh -ec "$$LOCKED_VENV" venv $(VERSION)-bench

mutants-tools: test-packages
	@sh -ec "$$LOCKED_VENV" venv $(VERSION)-mutants

lock: test-packages
	@sh -ec "$$LOCKED_VENV" venv uv
	@sh -ec "$$WRITE_LOCKS"

# All Pythons use the same versions, those that 3.9 can have; only what `make bench` draws with and
# what `make mutants` runs may be newer. (mutmut needs Python 3.10.) Who runs uv on which machine makes
# no difference. The lock of uv comes last: for next time.
LOCK_PYTHONS = 3.9 3.10 3.11 3.12 3.13 3.14
define WRITE_LOCKS
lock() {
	echo "Writing .ci/lock/$$3.txt"
	.venv/uv/bin/uv pip compile --quiet --no-config --python .venv/uv/bin/python \
		--python-platform linux --upgrade --only-binary :all: --generate-hashes \
		--no-emit-index-url --annotation-style line --custom-compile-command 'make lock' \
		--python-version "$$1" -o ".ci/lock/$$3.txt" ".ci/lock/$$2.in" $$4
}
lock 3.9 tools 3.9
for version in $(filter-out 3.9,$(LOCK_PYTHONS)); do
	lock $$version tools $$version "-c .ci/lock/3.9.txt"
	lock $$version mutants $$version-mutants "-c .ci/lock/$$version.txt"
done
for version in $(LOCK_PYTHONS); do
	lock $$version bench $$version-bench "-c .ci/lock/$$version.txt"
done
lock 3.9 uv uv
endef

# .venv/NAME is made from .ci/lock/NAME.txt: from the files whose hashes that gives, and from nothing
# else. pip's settings may say where to find them, and not what else to install, or where. A copy of
# the lock is the last thing to come, so what was interrupted is made anew, as is what has changed.
define LOCKED_VENV
lock=.ci/lock/$$1.txt
venv=.venv/$$1
if cmp -s "$$lock" "$$venv/lock.txt"; then
	exit 0
elif [ ! -e "$$lock" ]; then
	echo "There is no $$lock, so no tools for this Python."
	echo "Try one of $(LOCK_PYTHONS), such as: make test PYTHON=$(lastword $(PYTHONS))"
	exit 1
fi
echo "Installing into $$venv what $$lock says"
rm -rf "$$venv"
$(PYTHON) -m venv "$$venv"
env -u PIP_REQUIREMENT -u PIP_CONSTRAINT -u PIP_EDITABLE \
	-u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT -u PIP_USER -u PIP_PYTHON \
	"$$venv/bin/python" -I -m pip install --quiet --disable-pip-version-check \
	--require-hashes --no-deps --only-binary :all: -r "$$lock"
cp "$$lock" "$$venv/lock.txt"
endef

define INSTALL
command="apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends $$*"
echo "Missing here, by the names of Debian's packages: $$*"
if ! command -v apt-get >/dev/null; then
	echo "Install them in your system's way, then try again."
	exit 1
elif [ "$$(id -u)" = 0 ]; then
	echo "Installing them: $$command"
	sh -c "$$command" </dev/null && exit
elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
	echo "Installing them through sudo: $$command"
	sudo sh -c "$$command" && exit
fi
echo "Run this, then try again:"
echo "  su - -c '$$command'"
exit 1
endef

# What --help prints for each command, as a page of the manual: see man(7). Roff takes a backslash, a
# dash, and a dot or quote at the start of a line for its own.
define MAN_PAGE
import sys
sys.path.insert(0, sys.argv[1])
import letmein
print('.TH LETMEIN 1')
print('.SH NAME')
print('letmein \\- an authenticated port knocker')
for command in (letmein.LETMEIN, *letmein.COMMANDS):
    print('.SH', command.name.upper() or 'SYNOPSIS')
    print('.nf')
    for line in letmein.help_text(command).splitlines():
        print('\\&' + line.replace('\\', '\\e').replace('-', '\\-'))
    print('.fi')
endef

define COVERAGE_INI
[report]
show_missing = True
exclude_also = if TYPE_CHECKING:
[run]
branch = True
parallel = True
sigterm = True
include = $(CURDIR)/letmein.py
disable_warnings = no-data-collected
endef

# A .pth file is read by every Python of the .venv. letmein's network process starts with an empty
# environment; whether it counts is then said by a file that its parent, the server, has left. It is
# named after the parent's id and start, for ids come again within one run of the suite, and who
# counts under a filter of system calls is ended by it.
define COVERAGE_START
import atexit
import os
import sys


def mark(process):
    with open(f"/proc/{process}/stat") as status:
        start = status.read().rpartition(")")[2].split()[19]
    return f"{sys.prefix}/measured/process-{process}-{start}"


def save():
    try:
        measurement.stop()
        measurement.save()
    except Exception:
        pass  # a process that has given up the right to write files


if os.environ.get("COVERAGE_PROCESS_START") or (
    "PATH" not in os.environ and os.path.exists(mark(os.getppid()))
):
    import coverage

    open(mark(os.getpid()), "w").close()
    measurement = coverage.Coverage(config_file=os.path.join(sys.prefix, "coverage.ini"))
    measurement.start()
    atexit.register(save)
endef

export LOCKED_VENV WRITE_LOCKS INSTALL MAN_PAGE COVERAGE_INI COVERAGE_START
