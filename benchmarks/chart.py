"""Draw the rates of the peers."""

from __future__ import annotations

from pathlib import Path

import pygal
from pygal.style import CleanStyle

from benchmarks.plan import MAIN_SIZE
from benchmarks.results import Results
from benchmarks.roster import PEERS

SHOWN = {"new": "new names", "existing": "existing names"}
LEFT_OUT = ("pgbench", "hello")  # other scales: what they do is in the table


def write(results: Results, path: Path) -> None:
    """Write bars of requests a second as SVG."""
    peers = [name for name in PEERS if name not in LEFT_OUT]
    chart = pygal.HorizontalBar(
        style=CleanStyle(background="white", plot_background="white", value_font_size=11),
        title=f"Requests a second, {MAIN_SIZE:,} rows (median of the rounds)",
        height=420,
        js=[],  # nothing from elsewhere
        print_values=True,
        value_formatter=lambda value: f"{value:,.0f}",
        legend_at_bottom=True,
        show_x_guides=False,
        show_y_guides=False,
    )
    chart.x_labels = list(reversed(peers))
    for workload, title in SHOWN.items():
        rates = (results.rate(peer, workload, MAIN_SIZE) for peer in reversed(peers))
        chart.add(title, [None if rate is None else round(rate.median) for rate in rates])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(chart.render())
