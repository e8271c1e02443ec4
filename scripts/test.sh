#!/bin/sh
# Run the tests, several files at a time. What fails is run once more, alone: many tests are whole networks with their own
# daemons, and some of what they wait for comes late on a machine that is busy with the others. A fault of ours fails twice, and
# that ends with an error; what passes alone is named, and can be looked into.
#
#   scripts/test.sh [PYTEST OPTIONS]
set -u

cd "$(dirname "$0")/.."
python=.venv/bin/python
"$python" -m pytest --cache-clear -n 3 --dist loadfile --no-loadscope-reorder "$@" && exit 0
code=$?
[ "$code" = 1 ] || exit "$code" # 1: tests failed. Anything else is no matter of patience
failed=$(grep -c '::' .pytest_cache/v/cache/lastfailed 2>/dev/null) || failed=0
[ "$failed" -gt 0 ] || exit "$code" # something else: tests that could not be collected, a skip where nothing may be skipped
if [ "$failed" -gt 12 ]; then
    echo "test: $failed tests failed: too many to blame the machine" >&2
    exit 1
fi
echo "test: these failed beside others, and are run once more, alone:" >&2
grep '::' .pytest_cache/v/cache/lastfailed >&2
exec "$python" -m pytest --last-failed --last-failed-no-failures none "$@"
