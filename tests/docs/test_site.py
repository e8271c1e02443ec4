"""The site: built strictly, whole, and by itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Proxies lead nowhere, so that a build that wants something from outside fails."""
    target = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_every_page_is_there_and_in_the_navigation(site):
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    built = {page.with_name("index.html") if page.name == "README.md" else page.with_suffix(".html") for page in pages}
    assert sorted(str(page) for page in built if not (site / page).is_file()) == []
    navigation = (site / "start.html").read_text().partition("<article")[0]
    linked = set(re.findall(r'href="([^"#]+\.html)"', navigation))
    assert sorted(str(page) for page in built if str(page) not in linked) == []


def test_the_readme_is_its_first_page_with_links_that_lead_into_the_site(site):
    text = (site / "index.html").read_text()
    assert 'id="join-real-hosts"' in text
    assert 'href="configuration.html"' in text
    assert 'href="docs/' not in text
    assert "<p>```" not in text  # blocks within its numbered lists
    assert "```sh" not in text


def test_files_beside_the_documents_are_shown(site):
    text = (site / "systemd.html").read_text()
    assert 'href="outside/examples-cloud-config-wincey.yaml.html"' in text
    assert "coreos" in (site / "outside" / "examples-cloud-config-wincey.yaml.html").read_text()


def test_nothing_is_loaded_from_elsewhere(site):
    strangers = set()
    for page in site.rglob("*.html"):
        text = page.read_text()
        strangers |= set(re.findall(r'<(?:script|img|iframe|source)[^>]*\bsrc="(?:https?:)?//([^/"]+)', text))
        strangers |= set(re.findall(r'<link[^>]*\bhref="(?:https?:)?//([^/"]+)', text))
    assert strangers == set()


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    for name in ("mkdocs.yml", "README.md", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    config = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").unlink()
    (tmp_path / "mkdocs.yml").write_text(config[: config.index("nav:")])
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "wrong.md").write_text("# Wrong\n\n[nowhere](nowhere.md)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-d", tmp_path / "site"],
        cwd=tmp_path,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "'nowhere.md'" in done.stderr
