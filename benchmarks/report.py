"""Write the figures down as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plan import MAIN_SIZE, WORKLOADS
from benchmarks.results import Results, Spread, spread
from benchmarks.roster import PEERS, Peer
from benchmarks.targets import TARGETS, Target

MARKER = "<!-- Below this line everything is written by `make bench`; above it, by hand. -->"
VERDICTS = {True: "reached", False: "**not reached**", None: "not measured"}
TITLE = "# How fast it is\n"
EXTRA_TITLES = {
    "batch": "employees a second by `POST /api/v1/employees/batch`, 1,000 a request",
    "beside": "single creates by six clients, beside two that send lists of 1,000 back to back",
    "import": "`flask employees import`, from its start to its end",
    "start": "seconds to import `app` and call `create_app`",
    "memory": "resident MB of each worker, by the requests it answered",
    "production": "the rate with tokens, logs and metrics, in parts of that without",
    "road": "the commands on a legacy table with duplicates, from their start to their end",
}


def write(results: Results, path: Path) -> None:
    """Write the report below the marker; what stands above it stays."""
    by_hand = path.read_text().partition(MARKER)[0] if path.exists() else TITLE
    chart = f"![New and existing names a second, by peer]({path.stem}.svg)"
    parts = [by_hand.rstrip(), MARKER, chart, tables(results), circumstances(results)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts).rstrip() + "\n")


def tables(results: Results) -> str:
    """Return everything that was measured."""
    sections = [_targets(results), *_rates(results), _ratios(results), _extras(results)]
    sections.append(_faults(results))
    return "\n\n".join(section for section in sections if section)


def circumstances(results: Results) -> str:
    """Return where and how it was measured."""
    who = [(f"`{peer.name}`", peer.about, _served(peer)) for peer in PEERS.values()]
    return "\n\n".join(
        (
            "## Who",
            _table(("", "", "served by"), who),
            "## Where and how",
            _table(("", ""), (results.machine | results.conditions).items()),
            ", ".join(f"{name} {version}" for name, version in results.versions.items()) + ".",
        )
    )


def _served(peer: Peer) -> str:
    """Return the command, without the folder that its program is in."""
    if not peer.command:
        return ""
    words = (Path(word).name if word.startswith("/") else word for word in peer.command)
    return f"`{' '.join(words)}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _targets(results: Results) -> str:
    rows = [_target(target, results) for target in TARGETS]
    missed = sum(target.is_reached(results) is False for target in TARGETS)
    words = f"{missed} of {len(TARGETS)} are not reached." if missed else ""
    table = _table(("", "measured", "target", ""), rows)
    return "\n\n".join(part for part in ("## Targets", table, words) if part)


def _target(target: Target, results: Results) -> Sequence[str]:
    measured = target.figure(results)
    bound = f"{'≥' if target.at_least else '≤'} {_number(target.bound)} {target.unit}".strip()
    value = "" if measured is None else f"{_spread(measured)} {target.unit}".strip()
    return target.title, value, bound, VERDICTS[target.is_reached(results)]


def _rates(results: Results) -> Iterator[str]:
    for rows in sorted({one.rows for one in results.measurements}):
        yield f"## Requests a second, {rows:,} rows"
        yield "The median of the rounds (least-most); p50 / p99."
        measured = {one.workload for one in results.measurements if one.rows == rows}
        workloads = [name for name in WORKLOADS if name in measured]
        lines = [
            (peer, *(_cell(results, peer, workload, rows) for workload in workloads))
            for peer in PEERS
            if any(results.of(peer, workload, rows) for workload in workloads)
        ]
        yield _table(("", *workloads), lines)


def _cell(results: Results, peer: str, workload: str, rows: int) -> str:
    """Return rate, and latencies: a median of p50, one of p99."""
    rate = results.rate(peer, workload, rows)
    measured = results.of(peer, workload, rows).values()
    half = spread(one.load.p50 for one in measured)
    nearly_all = spread(one.load.p99 for one in measured)
    if rate is None or half is None or nearly_all is None:
        return ""
    return f"{_spread(rate)}; {half.median:.1f} / {nearly_all.median:.1f} ms"


def _ratios(results: Results) -> str:
    rows = []
    for peer in PEERS:
        ratios = [
            results.ratio(("rollcall", workload, MAIN_SIZE), (peer, workload, MAIN_SIZE))
            for workload in WORKLOADS
        ]
        if peer != "rollcall" and any(ratios):
            rows.append((peer, *("" if ratio is None else _spread(ratio) for ratio in ratios)))
    if not rows:
        return ""
    return f"## Rollcall against each, {MAIN_SIZE:,} rows\n\n{_table(('', *WORKLOADS), rows)}"


def _extras(results: Results) -> str:
    lines = [
        (EXTRA_TITLES[kind], "; ".join(f"{name}: {_value(value)}" for name, value in found.items()))
        for kind, found in results.extras.items()
    ]
    return f"## Rollcall alone\n\n{_table(('', ''), lines)}" if lines else ""


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    return ", ".join(map(_number, value)) if isinstance(value, list) else _number(value)


def _faults(results: Results) -> str:
    faults = results.faults()
    lines = "\n".join(f"- {fault}" for fault in faults)
    return f"## Measurements that do not count\n\n{lines}" if faults else ""


def _spread(figure: Spread) -> str:
    if figure.low == figure.high:
        return _number(figure.median)
    return f"{_number(figure.median)} ({_number(figure.low)}-{_number(figure.high)})"


def _number(value: float) -> str:
    """Return as many digits as mean something."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}".removesuffix(".0")
