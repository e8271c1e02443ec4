"""A real bash completes commands and options with what `wincey completion bash` prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def complete(*words):
    """What bash would offer for the last word."""
    script = f"""
PATH={BIN}:$PATH
eval "$(wincey completion bash)"
COMP_WORDS=({" ".join(words)} {"''" if not words[-1] else ""})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_wincey_completion wincey
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60, env=dict(os.environ)
    )
    return done.stdout.split()


def test_commands_and_options_are_completed():
    assert {"status", "peers", "diff", "explain", "leases", "lab"} <= set(complete("wincey", ""))
    assert complete("wincey", "sta") == ["status"]
    assert "--json" in complete("wincey", "status", "--")
    assert complete("wincey", "leases", "res") == ["reserve"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_theirs(shell):
    done = subprocess.run([BIN / "wincey", "completion", shell], capture_output=True, text=True, check=True, timeout=60)
    assert "_WINCEY_COMPLETE" in done.stdout
