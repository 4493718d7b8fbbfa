"""Draw the charts of recorded results again, and fill the README's tables from them.

    python bench/make_tables.py

In README.md, what stands between `<!-- begin results: bench/results/.../NAME.json -->` and `<!-- end results -->` is
replaced by that file's tables and charts, with the device and versions they come from.
"""

import json
import re
from pathlib import Path
from typing import Any

from rpo_kernels.profile.capacity import memory_lines
from rpo_kernels.profile.charts import draw_bench, draw_memory
from rpo_kernels.profile.reports import columns_of, format_ms, reasons

_BLOCK = re.compile(r"(<!-- begin results: (\S+) -->\n).*?(<!-- end results -->)", re.DOTALL)


def fill(readme: Path) -> None:
    """Replace every results block of a Markdown file; paths are relative to the file."""

    def block(match: re.Match[str]) -> str:
        path = readme.parent / match[2]
        data = json.loads(path.read_text())
        draw = draw_bench if data["kind"] == "bench" else draw_memory
        charts = [chart.relative_to(readme.parent) for chart in draw(data, path.parent, path.stem)]
        pictures = "".join(f"\n![{chart.stem}]({chart})\n" for chart in charts)
        return f"{match[1]}{markdown(data)}{pictures}{match[3]}"

    readme.write_text(_BLOCK.sub(block, readme.read_text()))


def markdown(data: dict[str, Any]) -> str:
    """A results file as Markdown: where it comes from, then a table for each problem."""
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    driver = f", driver {machine['driver']}" if machine["driver"] else f", {machine['threads']} threads"
    source = f"{machine['device']}{driver}, {machine['date'][:10]}; {versions}"
    if data["kind"] == "memory":
        return f"\n{source}.\n\n{data['title']}:\n\n{_table(*memory_lines(data))}"
    rates = data["rates"]
    parts = [f"\n{source}. Copy {rates['copy'] / 1e9:.0f} GB/s, read {rates['read'] / 1e9:.0f} GB/s.\n"]
    for entry in data["problems"]:
        gemm = f" (one head GEMM {format_ms(entry['gemm_s'])} ms, {entry['gemm_dtype']})" if "gemm_s" in entry else ""
        parts.append(f"\n{entry['title']}{gemm}:\n\n{_table(*columns_of(entry, rates))}")
        if absent := reasons(entry):
            parts.append(f"\nNot measured: {'; '.join(absent)}.\n")
    return "".join(parts)


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, rule, *lines])


if __name__ == "__main__":
    fill(Path(__file__).parent.parent / "README.md")
