"""Fill the tables and charts of docs/benchmarks.md from recorded results.

    python bench/make_docs.py

What stands between `<!-- begin results: DEVICE/NAME.json -->` and `<!-- end results -->` is replaced by the tables and
charts of that file in bench/results/, with the device and versions they come from. A word after the file's name keeps
the tables (`tables`) or the charts (`charts`) only. Charts are drawn into docs/benchmarks/.
"""

import re
from pathlib import Path
from typing import Any

from train_levels import compare
from train_levels import draw as draw_training

from rpo_kernels.benchmark.charts import draw
from rpo_kernels.benchmark.machine import device_line, versions_line
from rpo_kernels.benchmark.results import load_json
from rpo_kernels.benchmark.tables import markdown, markdown_table

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(
    r"(<!-- begin results: (?P<path>\S+)(?: (?P<only>tables|charts))? -->\n).*?(<!-- end results -->)", re.DOTALL
)


def fill(page: Path, results: Path) -> None:
    """Replace every block of a Markdown file; charts go to a folder beside it that is named as it is."""
    text = page.read_text()

    def block(match: re.Match[str]) -> str:
        data = load_json(results / match["path"])
        shown = [] if match["only"] == "tables" else _charts(data, page, Path(match["path"]))
        tables = "" if match["only"] == "charts" else _tables(data)
        return f"{match[1]}\n{_source(data)}\n{tables}{''.join(shown)}{match[4]}"

    page.write_text(_BLOCK.sub(block, text))


def charts_in(text: str) -> list[str]:
    """Paths of the pictures of a page, relative to it."""
    return re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)


def _source(data: dict[str, Any]) -> str:
    machine = data["machine"]
    return f"{device_line(machine)}, {machine['date'][:10]}, commit {machine['commit']}; {versions_line(machine)}.\n"


def _charts(data: dict[str, Any], page: Path, path: Path) -> list[str]:
    folder = page.with_suffix("") / path.parent
    folder.mkdir(parents=True, exist_ok=True)
    drawn = (draw_training if data["kind"] == "training" else draw)(data, folder, path.stem, svg=False)
    return [f"\n![{chart.stem}]({chart.relative_to(page.parent)})\n" for chart in drawn]


def _tables(data: dict[str, Any]) -> str:
    if data["kind"] != "training":
        return markdown(data)
    settings = data["settings"]
    title = f"{settings['steps']} steps of two groups, K = 4, at most {settings['max_length']} tokens, float32"
    return f"\n**{title}**\n\n{markdown_table(*compare(data))}"


if __name__ == "__main__":
    fill(ROOT / "docs" / "benchmarks.md", ROOT / "bench" / "results")
