"""What mkdocs is told beyond mkdocs.yml: pages and files of the repository that lie outside docs/ belong to the site.

README.md is its first page. A link that leaves docs/ leads to a copy in the site: markdown as a page, other files as
they are, so that the built site needs no server and no repository beside it. Notebooks become pages of their cells.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(\]\(|src=\")(?![a-z]+:|#)([^)#\"\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the repository's own pages, every file that a page links to, and the notebooks."""
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        text = page_of(notebook)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
    known = {ROOT / "docs" / file.src_uri for file in files}
    waiting = [ROOT / name for name in PAGES] + [path for path in known if path.suffix == ".md" and path.exists()]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if path not in known:
            files.append(File.generated(config, place_of(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            waiting += [target for target in targets_of(path) if target.is_file() and target.suffix != ".ipynb"]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points relative links at where their files stand in the site; a column with nothing in it is left out."""
    source = source_of(page.file.src_uri)
    empty = [name for name, is_so in (("navigation", page.is_homepage), ("toc", "\n## " not in markdown)) if is_so]
    page.meta.setdefault("hide", empty)

    def pointed(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / link[2]))
        if not target.is_relative_to(ROOT) or not target.exists():
            return link[0]  # mkdocs says that it leads nowhere
        here = PurePosixPath(page.file.src_uri).parent
        place = os.path.relpath(place_of(target), here).replace(os.sep, "/")
        return link[1] + place

    return _LINK.sub(pointed, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Takes the brackets off names that docstrings refer to as [`name`]."""
    return re.sub(r"\[(<code>[^<]+</code>)\]", r"\1", html)


def place_of(path: Path) -> str:
    """Where a file of the repository stands in the site, as mkdocs names sources: relative to docs/."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("docs/"):
        name = name[len("docs/") :]
        return re.sub(r"\.ipynb$", ".md", name)
    return PAGES.get(name, f"repository/{name}")


def source_of(place: str) -> Path:
    """The file that stands at a place in the site."""
    for name, page in PAGES.items():
        if page == place:
            return ROOT / name
    if place.startswith("repository/"):
        return ROOT / place[len("repository/") :]
    return ROOT / "docs" / place


def targets_of(path: Path) -> list[Path]:
    """The files that a page links to."""
    found = _LINK.findall(path.read_text(encoding="utf-8"))
    return [Path(os.path.normpath(path.parent / name)) for _, name in found]


def page_of(notebook: Path) -> str:
    """A notebook's cells as markdown; the notebook itself is linked at the top."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            shell = text.startswith("!")
            text = f"```{'bash' if shell else 'python'}\n{re.sub('^!', '', text, flags=re.M)}\n```"
        parts.append(text)
    parts.insert(1, f"The notebook is `docs/notebooks/{notebook.name}` in the repository.")
    return "\n\n".join(parts) + "\n"
