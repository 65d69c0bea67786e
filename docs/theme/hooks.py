"""What mkdocs does not do by itself: parts of the repository outside of docs/ that the site shows or links to."""

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FORMULA = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])([^)#\s]+)")


def on_config(config: Any) -> Any:
    """Leave pages that are not written yet out of the navigation."""
    config.nav = existing(config.nav, Path(config.docs_dir))
    return config


def existing(entry: Any, docs: Path) -> Any:
    if isinstance(entry, str):
        return entry if entry in PAGES.values() or (docs / entry).exists() else None
    if isinstance(entry, dict):
        return {name: kept for name, inner in entry.items() if (kept := existing(inner, docs))}
    return [kept for inner in entry if (kept := existing(inner, docs))]


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's own pages, and each file outside of docs/ that a page links to."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    linked = {target for page in files.documentation_pages() for target in links(page) if not target.startswith("docs/")}
    for target in sorted(linked - set(PAGES)):
        if (ROOT / target).is_file():
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links that are right in the repository be right in the site, and formulas be MathML, which needs no script.

    A page without neighbours has no list of them.
    """
    if page.parent is None:
        page.meta["hide"] = ["navigation"]
    here = posixpath.dirname(page.file.src_uri)
    markdown = FORMULA.sub(lambda found: f"<div>{convert(found[1], display='block')}</div>", markdown)
    return LINK.sub(lambda found: posixpath.relpath(in_site(in_repository(page.file, found[1])), here or "."), markdown)


def links(page: File) -> set[str]:
    return {in_repository(page, target) for target in LINK.findall(page.content_string)}


def in_repository(page: File, target: str) -> str:
    """Return the path from the top of the repository that a link on a page means."""
    source = {name: path for path, name in PAGES.items()}.get(page.src_uri, f"docs/{page.src_uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def in_site(path: str) -> str:
    return PAGES.get(path, path.removeprefix("docs/"))
