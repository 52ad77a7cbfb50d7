"""A small lake under test: folders, a configuration, and the real binary.

Owns: writing sample folders with pyarrow and starting `alluvium`. Never: knows how the product works
inside; it sees exit codes, what is printed, and the tables as other readers see them.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder

import oracle

BINARY = os.environ.get("ALLUVIUM_BINARY", "alluvium")
TIMEOUT_SECONDS = 120

PIPELINE = """
[pipeline.{name}]
source = "./{source}"
raw = "./{name}/raw"
main = "./{name}/main"
key = ["id"]
delete_when = "op = 'D'"
{ready}
{more}
"""


@dataclass
class Result:
    """How a process ended."""

    code: int
    out: str
    err: str

    def json(self) -> list[dict[str, Any]]:
        return json.loads(self.out)["items"]


@dataclass
class Lake:
    """One folder with a configuration and pipelines."""

    root: Path
    pipelines: dict[str, str] = field(default_factory=dict)

    def pipeline(
        self, name: str = "p", more: str = "", ready: str = 'ready = { marker = "_SUCCESS" }',
        source: str | None = None, columns: str = "", deletes: bool = True,
    ) -> "Lake":
        """`columns` are declared ones; without `deletes` no row needs an `op`."""
        source = source or f"in_{name}"
        more += f"\n[pipeline.{name}.columns]\n{columns}\n" if columns else ""
        (self.root / source).mkdir(exist_ok=True)
        text = PIPELINE if deletes else PIPELINE.replace("""delete_when = "op = 'D'"\n""", "")
        self.pipelines[name] = text.format(name=name, source=source, ready=ready, more=more)
        self.configure()
        return self

    def configure(self, head: str = "") -> None:
        text = '[state]\nuri = "./state"\n[worker]\nslots = 2\n' + head
        (self.root / "alluvium.toml").write_text(text + "".join(self.pipelines.values()))

    def folder(self, epoch: int | str, name: str = "p") -> Path:
        return self.root / f"in_{name}" / str(epoch)

    def deliver(
        self, epoch: int | str, rows: list[tuple], name: str = "p", complete: bool = True,
        file: str = "part-0.parquet", schema: pa.Schema | None = None,
    ) -> Path:
        """Writes rows (id, value, op) as one file of the epoch's folder."""
        folder = self.folder(epoch, name)
        folder.mkdir(parents=True, exist_ok=True)
        schema = schema or pa.schema(
            [("id", pa.string()), ("value", pa.int64()), ("op", pa.string())]
        )
        columns = list(zip(*rows)) if rows else [[] for _ in schema]
        arrays = [pa.array(list(c), type=f.type) for c, f in zip(columns, schema)]
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), folder / file)
        if complete:
            (folder / "_SUCCESS").write_text("done")
        return folder

    def write(self, epoch: int | str, file: str, content: str | bytes | pa.Table, name: str = "p") -> Path:
        """Writes one file of the epoch's folder, text, bytes or Parquet, and completes the folder."""
        path = self.folder(epoch, name) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        (self.folder(epoch, name) / "_SUCCESS").write_text("done")
        return path

    def alluvium(self, *arguments: str, env: dict[str, str] | None = None) -> Result:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("ALLUVIUM_")}
        done = subprocess.run(
            [BINARY, *arguments], cwd=self.root, env=clean | (env or {}), text=True,
            capture_output=True, timeout=TIMEOUT_SECONDS, stdin=subprocess.DEVNULL, check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("ALLUVIUM_")}
        return subprocess.Popen(
            [BINARY, *arguments], cwd=self.root, env=clean | (env or {}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )

    def run(self, code: int = 0, env: dict[str, str] | None = None) -> Result:
        """`run --once`, which must end with `code`."""
        result = self.alluvium("run", "--once", env=env)
        assert result.code == code, f"exit {result.code}, not {code}\n{result.out}\n{result.err}"
        return result

    def main(self, name: str = "p") -> dict[str, int]:
        """Main as id -> value, read by another reader."""
        rows = oracle.read_main(str(self.root / name / "main"), ["id"])
        return {key[0]: row["value"] for key, row in rows.items()}

    def rows(self, table: str = "main", by: str = "id", name: str = "p") -> list[dict[str, Any]]:
        """All rows and columns, read by Python deltalake, which knows deletion vectors only like this."""
        read = QueryBuilder().register("t", DeltaTable(self.root / name / table))
        found = pa.table(read.execute("SELECT * FROM t").read_all()).to_pylist()
        return sorted(found, key=lambda row: str(row[by]))

    def types(self, table: str = "main", name: str = "p") -> dict[str, Any]:
        """Data columns in their order, with their types as the Delta log has them."""
        schema = json.loads(DeltaTable(self.root / name / table).schema().to_json())
        return {f["name"]: f["type"] for f in schema["fields"] if not f["name"].startswith("_")}

    def refused(self, name: str = "p") -> list[tuple[str, int | None, Any]]:
        """Reason, position and content of each row in quarantine, by epoch, file and position."""
        items = self.alluvium("quarantine", "show", name, "-o", "json").json()
        return [(item["reason"], item.get("row"), item["content"]) for item in items]

    def states(self, name: str = "p") -> dict[int, str]:
        items = self.alluvium("epochs", name, "-o", "json").json()
        return {item["epoch"]: item["state"] for item in items}

    def markers(self, table: str, name: str = "p") -> dict[str, int]:
        return oracle.read_markers(str(self.root / name / table))

    def version(self, table: str, name: str = "p") -> int:
        log = self.root / name / table / "_delta_log"
        return max(int(path.stem) for path in log.glob("*.json"))
