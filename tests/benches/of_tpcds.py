"""The merge cases that delta-rs measures itself with: TPC-DS `web_returns`, keyed by item and order.

Owns: rows of that shape (24 columns, as many rows as at scale 10), and epochs that only delete, only
insert, or update a share of the table. Calls: `of_merges` for all that is measured.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import write_deltalake

ROWS = 719_217
FILE_ROWS = 72_000
KEY = ["wr_item_sk", "wr_order_number"]
WHOLE = [
    "wr_returned_date_sk", "wr_returned_time_sk", "wr_refunded_customer_sk", "wr_refunded_cdemo_sk",
    "wr_refunded_hdemo_sk", "wr_refunded_addr_sk", "wr_returning_customer_sk", "wr_returning_cdemo_sk",
    "wr_returning_hdemo_sk", "wr_returning_addr_sk", "wr_web_page_sk", "wr_reason_sk", "wr_return_quantity",
]  # fmt: skip
MONEY = [
    "wr_return_amt", "wr_return_tax", "wr_return_amt_inc_tax", "wr_fee", "wr_return_ship_cost",
    "wr_refunded_cash", "wr_reversed_charge", "wr_account_credit", "wr_net_loss",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """An epoch: a share of the table's rows, and so many new ones as a share of it."""

    name: str
    matched: float
    new: float
    way: str = "stream"


CASES = [
    Case("delete only, 5 %", 0.05, 0, "delete"),
    Case("insert only, 5 %", 0, 0.05, "insert"),
    Case("insert only, 50 %", 0, 0.50, "insert"),
    Case("upsert, 1 % matched, 10 % new", 0.01, 0.10),
    Case("upsert, 10 % matched, 1 % new", 0.10, 0.01),
    Case("upsert, 50 % matched, 0.1 % new", 0.50, 0.001),
    Case("upsert, 99 % matched, 1 % new", 0.99, 0.01),
]


def rows_of(numbers: np.ndarray, seed: int) -> pa.Table:
    """Each number is one return: an item of an order."""
    random = np.random.default_rng(seed)
    count = len(numbers)
    columns = {KEY[0]: pa.array((numbers * 7919 % 102_000).astype(np.int32)), KEY[1]: pa.array(numbers // 3)}
    columns |= {name: pa.array(random.integers(1, 100_000, count).astype(np.int32)) for name in WHOLE}
    cents = {name: pa.array(random.integers(0, 2_000_000, count).astype(np.float64) / 100) for name in MONEY}
    columns |= {name: values.cast(pa.decimal128(7, 2)) for name, values in cents.items()}
    return pa.table(columns)


def table_of(folder: Path) -> Path:
    """The table as delta-rs wrote it, made once."""
    table = folder / f"web-returns-{ROWS}"
    if not table.exists():
        order = np.random.default_rng(1).permutation(ROWS)
        for at in range(0, ROWS, FILE_ROWS):
            write_deltalake(table, rows_of(order[at : at + FILE_ROWS], at), mode="append")
    return table


def epoch_of(case: Case, lake: Path) -> list[Path]:
    """The one file of the epoch's folder."""
    random = np.random.default_rng(3)
    matched = random.choice(ROWS, int(ROWS * case.matched), replace=False)
    new = np.arange(ROWS, ROWS + int(ROWS * case.new))
    rows = rows_of(random.permutation(np.concatenate([matched, new])), 11)
    op = pa.array(["D" if case.way == "delete" else "U"] * len(rows))
    path = lake / "incoming/1/part-0.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(rows.append_column("op", op), path)
    (path.parent / "_SUCCESS").touch()
    return [path]
