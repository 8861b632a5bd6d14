"""A hook of mkdocs: README.md and the pages of benchmarks/ belong to the site too, and links lead to where pages are in it."""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
BENCHMARKS = ("benchmarks/README.md", "benchmarks/tables.md")
PAGES = {"README.md": "index.md", **{source: source for source in BENCHMARKS}}  # in the repository -> in the site


def on_files(files, config):
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text()))
    for path in (ROOT / "benchmarks" / "results").rglob("*.png"):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, files, **_):
    own = page.file.src_uri
    source = next((source for source, uri in PAGES.items() if uri == own), f"docs/{own}")

    def link(match):
        text, path, anchor = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
        uri = PAGES.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return text  # a file of the repository that is no page
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(own) or '.')}{anchor or ''})"

    return re.sub(r"\[([^\]]*)\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)", link, markdown)
