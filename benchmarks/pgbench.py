"""Put load on the database itself, with Rollcall's statement."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import table
from benchmarks.load import CONNECTIONS, Load, percentiles
from benchmarks.peers.statement import Statement
from benchmarks.processes import BenchmarkError, run
from migrations_bootstrap.embedded import find_binaries

# Above every number that the tables are filled with.
NEW = "random(1000000000, 4000000000000000000)"
MIXED = {"existing": 8, "new": 2}
PROCESSED = re.compile(r"number of transactions actually processed: (\d+)")
RATE = re.compile(r"tps = ([\d.]+)")


def find() -> str:
    """Return pgbench's path: beside the server's programs, or in PATH."""
    beside = find_binaries(None) / "pgbench"
    found = str(beside) if beside.is_file() else shutil.which("pgbench")
    if found is None:
        raise BenchmarkError("pgbench is missing: install the Debian package postgresql-contrib")
    return found


def pgbench(url: str, statement: Statement, workload: str, rows: int, seconds: float) -> Load:
    """Send the statement for some seconds, and again where it loses a race, as the service does."""
    with tempfile.TemporaryDirectory(prefix="rollcall-pgbench-") as name:
        folder = Path(name)
        said = run(
            [
                find(),
                "--no-vacuum",
                "--protocol=simple",
                f"--client={CONNECTIONS}",
                "--jobs=1",
                f"--time={max(1, round(seconds))}",
                "--random-seed=rand",
                "--max-tries=50",
                "--log",
                f"--log-prefix={folder / 'log'}",
                *(f"--file={script}" for script in _scripts(folder, statement, workload, rows)),
                url,
            ]
        )
        return _load(said, percentiles(_latencies(folder)))


def _scripts(folder: Path, statement: Statement, workload: str, rows: int) -> Iterator[str]:
    """Write the scripts of a workload and yield them, with their weights."""
    numbers = {"new": NEW, "existing": f"random(1, {rows})", "hot": "1"}
    for kind, weight in (MIXED if workload == "mixed" else {workload: 1}).items():
        path = folder / f"{kind}.sql"
        path.write_text(_script(statement, numbers[kind]))
        yield f"{path}@{weight}"


def _script(statement: Statement, number: str) -> str:
    r"""Return a script; ``\;`` joins its statements into one simple query."""
    given = {
        "name": table.name_sql(":number"),
        "department_id": str(table.DEPARTMENT_ID),
        "title": f"'{table.TITLE}'",
        "token": "md5((:token)::text)::uuid",
    }
    query = (
        (statement.plain % statement.parameters(**given)).replace("; ", " \\; ").replace("\n", " ")
    )
    return f"\\set number {number}\n\\set token {NEW}\n{query};\n"


def _latencies(folder: Path) -> Iterator[float]:
    """Yield what the log says of each transaction, in milliseconds (manual, "Per-Transaction")."""
    for log in folder.glob("log*"):
        with log.open() as lines:
            yield from (int(line.split()[2]) / 1000 for line in lines)


def _load(said: str, latencies: dict[str, float]) -> Load:
    processed, rate = PROCESSED.search(said), RATE.search(said)
    if processed is None or rate is None:
        raise BenchmarkError(f"pgbench said nothing of its result: {said}")
    requests = int(processed[1])
    return Load(requests=requests, seconds=requests / float(rate[1]), errors={}, **latencies)
