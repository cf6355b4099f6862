"""docs/ and README.md: examples run, links lead somewhere, options and names exist, the counts of the table are so."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
INDEX = DOCS / "README.md"
PAGES = sorted(DOCS.glob("*.md"))
# The table's line of a method -> its name in the block that counts.
COUNTED = {
    "LoRA, r = 16, all linears": "LoRA",
    "DoRA, the same": "DoRA",
    "Houlsby": "Houlsby",
    "Pfeiffer": "Pfeiffer",
    "parallel": "parallel",
    "prefix tuning, V = 20": "prefix",
    "the same, with its MLP": "prefix, MLP",
    "prompt tuning, V = 20": "prompt",
    "P-tuning, V = 20": "P-tuning",
    "(IA)^3": "(IA)^3",
    "LN tuning": "LN tuning",
}


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of the fenced blocks of a language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in found]


def run(page: Path) -> dict[str, Any]:
    """The page's blocks in turn, in one namespace; tracebacks give the page's own lines."""
    names: dict[str, Any] = {"__name__": page.stem}
    for line, text in blocks(page, "python"):
        tree = ast.increment_lineno(ast.parse(text, str(page)), line)
        exec(compile(tree, str(page), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("page", [p for p in PAGES if p != INDEX], ids=lambda page: page.stem)
def test_examples_run(page: Path) -> None:
    assert blocks(page, "python"), "every page has an example"
    before = torch.get_default_dtype()
    run(page)
    assert torch.get_default_dtype() == before


@pytest.mark.slow
def test_the_tables_counts_are_those_of_the_models() -> None:
    trained = run(INDEX)["trained"]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in INDEX.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    stated = {cells[0]: cells[1:3] for cells in lines if cells[0] in COUNTED and len(cells) == 7}
    assert stated.keys() == COUNTED.keys()
    assert sorted(COUNTED.values()) == sorted(trained)
    base = 8_030_261_248
    for method, (count, share) in stated.items():
        exact = trained[COUNTED[method]]
        assert count == f"{exact:,}", method
        digits = len(share.removesuffix(" %").partition(".")[2])
        assert share == f"{100 * exact / (base + exact):.{digits}f} %", method


def test_every_page_is_in_the_index() -> None:
    named = re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", INDEX.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in PAGES if page != INDEX)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md"], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_every_public_configuration_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    configurations = [name for name in fastlora.__all__ if name.endswith("Config")]
    assert len(configurations) > 10
    assert not [name for name in configurations if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md"], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_names_of_fastlora_exist(page: Path) -> None:
    for name in re.findall(r"(?<![\w/.])fastlora\.(\w+)", page.read_text(encoding="utf-8")):
        assert hasattr(fastlora, name), name


def test_the_features_name_every_configuration_page_and_test() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Methods") : text.index("## What is supported")]
    rows = [line for line in section.splitlines() if "](docs/" in line and line.startswith("|")]
    assert all("](tests/" in row or "the same" in row for row in rows)
    named = set(re.findall(r"\w+Config", section))
    made_by_methods = {n for n in fastlora.__all__ if n.endswith("Config")}
    settings_of_lora = {"EvaConfig", "LoftQConfig", "PeftConfig"}
    assert named == made_by_methods - settings_of_lora
    pages = set(re.findall(r"\]\(docs/(\w+)\.md", section))
    assert pages == {page.stem for page in PAGES}


@pytest.mark.parametrize(
    ("page", "config"), [("lora", fastlora.LoraConfig), ("bottleneck", fastlora.BottleneckConfig)]
)
def test_all_fields_that_are_refused_are_named(page: str, config: Any) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert config.unsupported
    assert not [name for name in config.unsupported if f"`{name}`" not in text]


def test_commands_have_the_options_that_pages_give_them() -> None:
    typer = pytest.importorskip("typer")
    from fastlora.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = 0
    for page in PAGES:
        for _, text in blocks(page, "sh"):
            for line in text.splitlines():
                program, name, *words = line.partition("#")[0].split()
                known = {option for p in commands[name].params for option in p.opts}
                used = {word for word in words if word.startswith("-")}
                assert program == "fastlora" and used <= known, line
                seen += len(used)
    assert seen > 5
