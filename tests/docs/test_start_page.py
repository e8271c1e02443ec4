"""docs/start.md: its commands, run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "start.md"


@pytest.mark.root
def test_five_minutes(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    found = re.findall(r"<!-- run(, and fail)? -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    blocks = [f"set +e\n{block}code=$?\nset -e\n[ $code = 2 ]\n" if fails else block for fails, block in found]
    assert len(blocks) == 6
    # A directory of its own, or `wincey lab exec` would not know which lab is meant where others are up.
    ours = f"wincey lab --directory {tmp_path / 'labs'} "
    script = "set -e\n" + "echo =====\n".join(blocks).replace("wincey lab ", ours)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    try:
        done = subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        if (tmp_path / "labs").exists():
            subprocess.run(["bash", "-c", f"{ours} down"], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made, looked, explained, broken, walled, _ = done.stdout.split("=====\n")
    assert made.rstrip().endswith("2 of 2 pairs reachable")
    assert "ready  yes" in looked
    assert "are as they should be" in looked
    assert "nothing on this host keeps packets from 10.5." in explained
    assert " via 10.5." in broken
    assert " 1 repaired since the start" in broken
    assert "let UDP port 8472 pass" in walled
