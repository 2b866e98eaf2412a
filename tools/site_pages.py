"""What the documentation site shows besides docs/: README.md as its first page, and a reference of the code, a page a package.

MkDocs calls these functions (`hooks` in mkdocs.yml). Links that lead out of docs/ become names, since the site holds no
sources; pages of docs/ that the navigation leaves out are added to it, so that a new one needs no edit here.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import treadle

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")

# A page of the reference: its file, its title, and the packages and modules on it.
REFERENCE = (
    ("library", "treadle", ("library", "distillation", "recipe", "settings", "registry", "errors", "trusted_code")),
    ("models", "treadle.models", ("models",)),
    ("layers", "treadle.layers", ("layers",)),
    ("ops", "treadle.ops", ("ops",)),
    ("objectives", "treadle.objectives", ("objectives",)),
    ("data", "treadle.data", ("data",)),
    ("text", "treadle.text", ("text",)),
    ("training", "treadle.training", ("training",)),
    ("evaluation", "treadle.evaluation", ("evaluation",)),
    ("generation", "treadle.generation", ("generation",)),
    ("planning", "treadle.planning", ("planning",)),
    ("distributed", "treadle.distributed", ("distributed",)),
    ("checkpoint", "treadle.checkpoint", ("checkpoint",)),
    ("monitor", "treadle.monitor", ("monitor",)),
    ("storage", "treadle.storage", ("storage",)),
    ("suite", "treadle.suite", ("suite",)),
    ("reporting", "treadle.reporting", ("reporting",)),
    ("convert", "treadle.convert", ("convert",)),
)


def modules(name: str) -> list[str]:
    """Dotted names of the public modules of `treadle/NAME`, a file or a folder, in order."""
    place = ROOT / "treadle" / name
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    public = [file for file in files if not file.name.startswith("_")]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in public]


def public_names() -> list[str]:
    """What `import treadle` gives, as a table of links to where it is described."""
    pages = {f"treadle.{name}": page for page, _, names in REFERENCE for name in names}
    lines = ["| `treadle.` | defined in |", "| --- | --- |"]
    for name, place in treadle._PLACES.items():
        module, _, attribute = place.partition(":")
        page = pages[".".join(module.split(".")[:2])]
        lines.append(f"| [`{name}`]({page}.md#{module}.{attribute}) | `{module}` |")
    return [*lines, ""]


def reference_page(title: str, names: tuple[str, ...]) -> str:
    """Markdown of one page."""
    lines = [f"# {title}", ""]
    lines += public_names() if title == "treadle" else []
    for module in (module for name in names for module in modules(name)):
        lines += [f"::: {module}", ""]
    return "\n".join(lines)


def inside(text: str, folder: str, pages: set[str]) -> str:
    """`text` of a file in `folder` ("" or "docs") with links as the site has them: to its own files, else the bare label."""

    def link(found: re.Match[str]) -> str:
        image, label, target, anchor = found.groups()
        parts: list[str] = []
        for part in PurePosixPath(folder, target).parts:
            if part == "..":
                parts = parts[:-1]
            else:
                parts.append(part)
        place = "/".join(parts)
        if place == "README.md":
            return f"{image}[{label}](index.md{anchor or ''})"
        if place.removeprefix("docs/") in pages and place.startswith("docs/"):
            return f"{image}[{label}]({place.removeprefix('docs/')}{anchor or ''})"
        return label if (ROOT / place).exists() else found[0]  # what is nowhere stays a link, and fails the build

    return LINK.sub(link, text)


def on_config(config: MkDocsConfig) -> None:
    """The navigation, with the pages that it lacks."""
    nav: list[Any] = config.nav or []
    known = set(re.findall(r"[\w/]+\.md", str(nav)))
    missing = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in known)
    if missing:
        nav.insert(-2, {"More": list(missing)})
    nav[-1] = {"API reference": [{title: f"reference/{page}.md"} for page, title, _ in REFERENCE]}
    config.nav = nav


def on_files(files: Files, config: MkDocsConfig) -> None:
    """The pages that stand in no file of docs/."""
    pages = {file.src_uri for file in files}
    readme = inside((ROOT / "README.md").read_text(), "", pages)
    files.append(File.generated(config, "index.md", content=readme))
    for page, title, names in REFERENCE:
        files.append(File.generated(config, f"reference/{page}.md", content=reference_page(title, names)))


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """A page of docs/ with its links as the site has them."""
    own = page.file.generated_by is None
    return inside(markdown, "docs", {file.src_uri for file in files}) if own else markdown
