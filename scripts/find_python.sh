#!/bin/sh
# Prints the path of the newest supported Python on PATH that runs and has venv and pip.
#
#     sh scripts/find_python.sh          # 3.13, 3.12 or 3.11
#     sh scripts/find_python.sh 3.11     # this version only
#
# Candidates are run, because a version manager's shim may have no Python behind it.
set -u
CHECK='import ensurepip, sys, venv; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])'
versions=${*:-3.13 3.12 3.11}
for version in $versions; do
    for name in "python$version" python3 python; do
        IFS=:
        for directory in $PATH; do
            python=$directory/$name
            if [ -x "$python" ] && "$python" -c "$CHECK" "$version" 2>/dev/null; then
                echo "$python"
                exit 0
            fi
        done
        unset IFS
    done
done
echo "no Python $versions with venv and pip on PATH: install one (Debian: python3-venv)" \
    "or name one, as in: make test PYTHON=/path/to/python3.13" >&2
exit 1
