"""What README and docs/ say holds: the list of options, the links, the command lines."""

import importlib.util
import re
import shlex

import pytest
from conf_nodes import CONF, composed

from ldm.config.choices import said_in_words
from ldm.config.help import said_of
from ldm.config.schema import check_keys_are_read
from ldm.run import quoted

ROOT = CONF.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = sorted(p for p in CONF.glob("*/*.yaml"))


def make():
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs/make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands() -> list[tuple[str, str]]:
    """(page, line) of each indented command that has no placeholder for words."""
    lines = [(p.name, line) for p in PAGES for line in p.read_text().splitlines() if line.startswith("    ")]
    return [
        (page, line.split("-m ldm.run ")[1]) for page, line in lines if "-m ldm.run " in line and "[group" not in line
    ]


def test_the_options_page_is_what_conf_says_now():
    assert (ROOT / "docs/options.md").read_text() == make().options(), "python docs/make.py"


@pytest.mark.parametrize("path", OPTIONS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_option_says_what_it_is(path):
    assert said_of(path), "open the file with one comment line: what it is, and its source"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], link


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), commands())
def test_command_lines_compose(page, line):
    words = shlex.split(line)
    if "-m" in words:  # a sweep: its first arm, as far as what is drawn is left out
        words = [w.split(",")[0] for w in words if w != "-m" and "interval(" not in w]
    task = next((w.removeprefix("task=") for w in words if w.startswith("task=")), "train")
    overrides = [quoted(said_in_words(w), False) for w in words]
    composed(*overrides)
    check_keys_are_read(task, overrides)
