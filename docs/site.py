"""A hook of mkdocs: the README is the first page, and the pictures of `imgs/` come along, as GitHub shows them."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = ("notebooks/", "CONTRIBUTING.md", "CHANGELOG.md")  # in the repository, not on the site


def on_files(files, config):
    """Add the README and the pictures."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    for place in ELSEWHERE:
        readme = re.sub(rf"\[([^\]]*)\]\({re.escape(place)}[^)]*\)", r"\1", readme)
    files.append(File.generated(config, "index.md", content=readme))
    for picture in sorted((ROOT / "imgs").iterdir()):
        files.append(File.generated(config, f"imgs/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, **_):
    """Pictures are beside the pages there."""
    return markdown.replace("](../imgs/", "](imgs/").replace("](../README.md", "](index.md")
