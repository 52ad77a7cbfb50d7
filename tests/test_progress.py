"""Long work tells how far it is: on the terminal of a run, and of a cluster's workers.

Owns: that what is told names the step and grows. How fast anything is, is the benchmarks' business.
"""

from __future__ import annotations

import os
import pty
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lake import BINARY, Lake

SCHEMA = pa.schema([("id", pa.string()), ("value", pa.int64()), ("op", pa.string())])


def write_large(path: Path, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = pa.array([f"{number * 2654435761 % 2**32:08x}-{number:012x}" for number in range(rows)])
    table = pa.table({"id": ids, "value": range(rows), "op": pa.array(["U"] * rows)}, schema=SCHEMA)
    pq.write_table(table, path)


def test_the_moving_line_says_what_is_done_and_how_much_of_it(tmp_path: Path):
    lake = Lake(tmp_path).pipeline()
    write_large(lake.folder(10) / "part-0.parquet", 1_500_000)
    (lake.folder(10) / "_SUCCESS").touch()
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ALLUVIUM_")}
    process = subprocess.Popen(
        [BINARY, "run", "--once"], cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
        env=environment | {"TERM": "xterm", "COLUMNS": "200"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # All its ends are closed.
            break
    assert process.wait(120) == 0
    text = shown.decode(errors="replace")
    assert "p 10 ingest, reads the folder's rows: " in text, text[-2000:]
    assert " of 1500000 rows)" in text
    assert "merged: +1500000 rows" in text


def test_workers_tell_how_far_their_tasks_are(make):
    cluster = make()
    write_large(cluster.root / "in_p/10/part-0.parquet", 2_000_000)
    (cluster.root / "in_p/10/_SUCCESS").touch()
    cluster.coordinator()
    cluster.worker()
    told = []
    deadline = time.monotonic() + 120
    while cluster.states().get(10) != "processed" and time.monotonic() < deadline:
        for process in (cluster.api("/api/v1/workers") or {"items": []})["items"]:
            told += [task["progress"] for task in process["tasks"] if task["progress"]["doing"]]
        time.sleep(0.2)
    assert cluster.states().get(10) == "processed"
    assert told, "heartbeats come every two seconds, and it takes longer"
    for progress in told:
        assert 0 <= progress["done"]["rows"] <= progress["of"]["rows"] or progress["of"]["rows"] == 0, progress
