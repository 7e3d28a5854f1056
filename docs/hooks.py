"""For MkDocs: pages that are files of the repository outside docs/, and links between these and the others."""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Page of the site, and the file that it shows.
PAGES = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
SITE = {source: page for page, source in PAGES.items()}


def on_files(files, config):
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    return rewritten(markdown, PAGES.get(name, f"docs/{name}"), name, config.repo_url)


def rewritten(markdown, source, page, repo_url):
    """The text of `source`, with the links of the repository turned into those of the site's `page`.

    What the site does not have is linked to the repository, if its address is known, and otherwise only named.
    """

    def link(found):
        whole, text, target = found[0], found[1], found[2]
        file, hash_, anchor = target.partition("#")
        if not file or re.match(r"\w+:", target):
            return whole
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), file))
        there = SITE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if there is not None and not there.endswith(".py"):
            return f"[{text}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{hash_}{anchor})"
        if repo_url:
            return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path})"
        return text if text.startswith("`") else f"{text} (`{path}`)"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)  # code between fences stays as it is
    return "".join(
        part if part.startswith("```") else re.sub(r"\[([^\][]*)\]\(([^)\s]+)\)", link, part) for part in parts
    )
