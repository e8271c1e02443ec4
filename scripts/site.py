"""Hooks of mkdocs, named in mkdocs.yml: the site shows the repository's pages without a copy of any.

- The README is the first page. Files outside of docs/ that a page links to (examples, packaging, CONTRIBUTING.md) become
  pages of the site, below outside/.
- A pattern in `nav` stands for the pages that match and that nothing else in it names, so that a new page has its place.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()([^)\s#]+)")
_README, _FIRST, _OUTSIDE = "README.md", "index.md", "outside"
_LANGUAGES = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".service": "ini", ".socket": "ini", ".sh": "sh"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the README, and what pages link to outside of docs/; then put pages where nav's patterns say."""
    pages = {file.src_uri: Path(str(file.abs_src_path)).read_text() for file in files.documentation_pages()}
    named = {f"docs/{uri}": text for uri, text in pages.items()} | {_README: (ROOT / _README).read_text()}
    files.append(File.generated(config, _FIRST, content=_relinked(named[_README], _README)))
    queue = dict(named)
    while queue:
        source, text = queue.popitem()
        for target in _outside(text, source):
            uri = _uri(target)
            if uri not in files.src_uris:
                content = _shown(target)
                files.append(File.generated(config, uri, content=_relinked(content, target)))
                if target.endswith(".md"):
                    queue[target] = content
    config.nav = _expanded(config.nav or [], sorted(file.src_uri for file in files.documentation_pages()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to where their target is in the site."""
    del config, files
    if not page.file.generated_by:
        markdown = _relinked(markdown, f"docs/{page.file.src_uri}")
    return _indented(markdown)


# --- links ------------------------------------------------------------------------------------------------------------


def _targets(text: str, source: str) -> Iterator[str]:
    for found in _LINK.finditer(text):
        if "://" not in found[2] and not found[2].startswith("mailto:"):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))


def _outside(text: str, source: str) -> Iterator[str]:
    """Paths in the repository that a page links to and that the site does not have by itself."""
    for target in _targets(text, source):
        if not target.startswith(("docs/", "..")) and target != _README and (ROOT / target).exists():
            yield target


def _uri(path: str) -> str:
    """Where a path of the repository is in the site."""
    if path == _README:
        return _FIRST
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{_OUTSIDE}/{path.removesuffix('.md').replace('/', '-')}.md"


def _relinked(text: str, source: str) -> str:
    here = posixpath.dirname(_uri(source))

    def link(found: re.Match[str]) -> str:
        if "://" in found[2] or found[2].startswith("mailto:"):
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        if not (ROOT / target).exists():
            return found[0]  # mkdocs complains about it
        return found[1] + posixpath.relpath(_uri(target), here or ".")

    return _LINK.sub(link, text)


def _shown(target: str) -> str:
    """A file as a page, a directory as a page with all its files; a page as it is."""
    path = ROOT / target
    if path.suffix == ".md":
        return path.read_text()
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    parts = [f"# {target}"]
    for file in files:
        if path.is_dir():
            parts.append(f"## {file.relative_to(path)}")
        parts.append(f"```{_LANGUAGES.get(file.suffix, '')}\n{file.read_text().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _indented(text: str) -> str:
    """What belongs to an item of a numbered list, indented by four: CommonMark takes three, Python-Markdown doesn't."""
    inside, lines = False, []
    for line in text.splitlines():
        if re.match(r"\d+\. ", line):
            inside = True
        elif line and not line.startswith("   "):
            inside = False
        lines.append(f" {line}" if inside and line.startswith("   ") else line)
    return "\n".join(lines) + "\n"


# --- nav --------------------------------------------------------------------------------------------------------------


def _named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for each in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from _named(each)


def _expanded(nav: list[Any], pages: list[str]) -> list[Any]:
    """The nav with its patterns replaced by the pages that match; each page once, where it comes first."""
    left = [page for page in pages if page not in set(_named(nav))]

    def expand(items: list[Any]) -> list[Any]:
        found: list[Any] = []
        for item in items:
            if isinstance(item, dict):
                found.append({name: expand(each) if isinstance(each, list) else each for name, each in item.items()})
            elif "*" in item:
                folder = posixpath.dirname(item)
                taken = [page for page in left if posixpath.dirname(page) == folder and fnmatch.fnmatchcase(page, item)]
                left[:] = [page for page in left if page not in taken]
                found += taken
            else:
                found.append(item)
        return found

    return expand(nav)
