# What the checks share; sourced, not run. PYTHON is an environment that has torch and the build tools of `make install`.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")   # -s: a venv's python is a link, and its place is what counts
export PATH="$(dirname "$PYTHON"):$PATH"

say() { echo "$(basename "$0" .sh): $*"; }
fail() { say "$*" >&2; exit 1; }
[[ -x $PYTHON ]] || fail "no Python at $PYTHON: run \`make install\`, or set PYTHON"

# need COMMAND PACKAGE...: installs Debian packages when the command is missing and we may, else says what to install.
need() {
  local command=$1; shift
  command -v "$command" >/dev/null && return
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } >/dev/null 2>&1 || true
  fi
  command -v "$command" >/dev/null || fail "$command is missing: install the package(s) $* (or your system's equivalent)"
}

# build DIR [cmake option...]: configures, builds, and leaves an importable pyseq in DIR/site.
build() {
  local dir=$1; shift
  mkdir -p "$dir"
  cmake -S . -B "$dir" -G Ninja "$@" >"$dir.log" 2>&1 && ninja -C "$dir" -j "${JOBS:-2}" >>"$dir.log" 2>&1 ||
    { tail -40 "$dir.log"; fail "the build in $dir failed"; }
  rm -rf "$dir/site"
  mkdir -p "$dir/site/pyseq"
  tar -C pyseq --exclude='*.so' --exclude=__pycache__ -cf - . | tar -C "$dir/site/pyseq" -xf -
  cmake --install "$dir" --prefix "$dir/site" >/dev/null
  standalone "$dir/site"
}

# standalone SITE: from here on SITE's pyseq is what is imported there. An editable install, which `make install` makes,
# finds pyseq before anything on the path is looked at; SITE's sitecustomize takes that hook away.
standalone() {
  local site; site=$(realpath "$1")
  cat >"$site/sitecustomize.py" <<'END'
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
END
  local found; found=$(cd "$site" && PYTHONPATH=$site "$PYTHON" -c \
    'import importlib.util; print(importlib.util.find_spec("pyseq").origin)')
  [[ $found == "$site/"* ]] || fail "in $site, Python imports $found"
}

# tests SITE pytest-argument...: runs tests of this checkout on the pyseq in SITE. The working directory is on Python's
# path before everything else, so it must not be the checkout, whose pyseq/ would be imported.
tests() {
  local site=$1; shift
  (cd "$site" && PYTHONPATH=$PWD "$PYTHON" -m pytest "$@")
}
