# Sourced by the other scripts: makes the virtual environment and installs the package with the tested versions.
# DIFFTRAIN_VENV: where it lies (default .venv). Idempotent: nothing is installed again until the project's needs change.

VENV="${DIFFTRAIN_VENV:-.venv}"

find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer was found; install one and run this again." >&2
  return 1
}

install() {  # install EXTRAS, such as "test,dev" or ""
  local target="." stamp needs
  [ -n "$1" ] && target=".[$1]"
  needs=$(cat pyproject.toml constraints.txt | cksum | tr -d ' ')
  stamp="$VENV/.installed-${1:-core}-$needs"
  [ -e "$stamp" ] && return
  if [ ! -x "$VENV/bin/python" ]; then
    echo "making $VENV"
    "$(find_python)" -m venv "$VENV" || {
      echo "error: the venv module is missing; on Debian and Ubuntu: apt-get install python3-venv." >&2
      return 1
    }
  fi
  echo "installing difftrain${1:+ with $1} (the first time this downloads PyTorch; a few minutes)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable "$target"
  touch "$stamp"
}
