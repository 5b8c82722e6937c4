"""A hook of mkdocs: pages link to files of the repository, and the site carries those along."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
LINK = re.compile(r"\]\(\.\./([^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what any page links to above the folder of the documentation."""
    pages = [page.content_string for page in files.documentation_pages()]
    for name in sorted({name for page in pages for name in LINK.findall(page)}):
        for file in _behind(name):
            files.append(File.generated(config, _kept(file), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point to the files that were added; a folder's link leads to its first file."""
    return LINK.sub(lambda link: f"]({_kept(_behind(link.group(1))[0])})", markdown)


def _behind(name: str) -> list[pathlib.Path]:
    """A file, or those of a folder."""
    place = ROOT / name
    inside = [place] if place.is_file() else sorted(place.iterdir())
    return [path for path in inside if path.is_file()]


def _kept(file: pathlib.Path) -> str:
    """Its place in the site, where all but pictures are shown as text."""
    path = str(file.relative_to(ROOT))
    return path if path.endswith(".png") else f"{path}.txt"
