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
        place = ROOT / name
        inside = [place] if place.is_file() else sorted(place.iterdir())
        for file in (path for path in inside if path.is_file()):
            path = str(file.relative_to(ROOT))
            kept = path if path.endswith(".png") else f"{path}.txt"
            files.append(File.generated(config, kept, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point to the files that were added; a folder's link leads to its first file."""

    def moved(link: re.Match[str]) -> str:
        name = link.group(1)
        if (ROOT / name).is_dir():
            first = min(path for path in (ROOT / name).iterdir() if path.is_file())
            name = str(first.relative_to(ROOT))
        return f"]({name if name.endswith('.png') else f'{name}.txt'})"

    return LINK.sub(moved, markdown)
