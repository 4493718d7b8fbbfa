"""Fill the tables and charts of the documentation from the results in bench/results/.

    python bench/make_docs.py

The text between `<!-- begin results: DEVICE/NAME.json -->` and `<!-- end results -->` is replaced by the tables and
charts of that file, with the device and versions; a block whose file does not exist is left as it is. A word after the
file's name keeps the tables (`tables`) or the charts (`charts`) only. Charts are drawn into docs/benchmarks/DEVICE/.
"""

import os
import re
from pathlib import Path
from typing import Any

import shared_prompts
import train_levels
import trl_steps

from rpo_kernels.benchmark import charts, tables
from rpo_kernels.benchmark.machine import device_line, versions_line
from rpo_kernels.benchmark.results import load_json

PAGES = ("benchmarks.md", "shared-prompts.md", "integrations/trl.md")
# The module that makes tables and charts of each kind of results; all others are those of `rpo-kernels bench`.
_COMPARISONS: dict[str, Any] = {"training": train_levels, "trl": trl_steps, "shared prompts": shared_prompts}
ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(
    r"(<!-- begin results: (?P<path>\S+)(?: (?P<only>tables|charts))? -->\n).*?(<!-- end results -->)", re.DOTALL
)


def fill(page: Path, results: Path, drawings: Path) -> None:
    """Fill every block of a Markdown file whose results exist; charts go to `drawings`, in a folder for the device."""
    text = page.read_text()

    def block(match: re.Match[str]) -> str:
        path = results / match["path"]
        if not path.exists():
            return match[0]
        data = load_json(path)
        shown = [] if match["only"] == "tables" else _charts(data, page, drawings / path.parent.name, path.stem)
        described = "" if match["only"] == "charts" else tables.markdown(_tables(data))
        return f"{match[1]}\n{_source(data)}\n{described}{''.join(shown)}{match[4]}"

    page.write_text(_BLOCK.sub(block, text))


def charts_in(text: str) -> list[str]:
    """Paths of the pictures of a page, relative to it."""
    return re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)


def _source(data: dict[str, Any]) -> str:
    machine = data["machine"]
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    return f"{device_line(machine)}, {machine['date'][:10]}{commit}; {versions_line(machine)}.\n"


def _charts(data: dict[str, Any], page: Path, folder: Path, name: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _COMPARISONS.get(data["kind"], charts).draw(data, folder, name, svg=False)
    return [f"\n![{chart.stem}]({os.path.relpath(chart, page.parent)})\n" for chart in drawn]


def _tables(data: dict[str, Any]) -> list[tables.Table]:
    return _COMPARISONS.get(data["kind"], tables).tables_of(data)


if __name__ == "__main__":
    for page in PAGES:
        fill(ROOT / "docs" / page, ROOT / "bench" / "results", ROOT / "docs" / "benchmarks")
