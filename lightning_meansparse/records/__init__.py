"""Evaluation records: one row per sample, alpha and attack, and every number drawn from them.

The rows are the measurement; accuracies, intervals, paired gains and the verdict are only ways to
read them, so each can be recomputed from the file alone. A flat table makes a long run easy to
write piece by piece: tables of several batches are concatenated, nothing else.

Terms: a *round* is one comparable measurement inside a split: the same attacks on the same samples
for all its alphas; ``"main"`` is the one that counts. *clean* is the accuracy without attack;
*apparent* what is left after the attacks that follow the exact gradient (kind ``"gradient"``);
*worst* what is left after every attack. The operator's gradient is zero inside its band, so
*apparent* can be far above *worst*; the gap is called *masking*, and only attacks of another kind
can measure it. A *gain* is worst-case accuracy minus that of the base (alpha = 0) **on the same
samples under the same attacks**.
"""

from lightning_meansparse.records.files import read_records, write_records
from lightning_meansparse.records.flags import Flag, flags
from lightning_meansparse.records.intervals import Paired, Proportion
from lightning_meansparse.records.runs import roles, rounds, splits
from lightning_meansparse.records.summary import AlphaSummary, choose_alpha, summarize, verdict
from lightning_meansparse.records.table import (
    FORMAT_VERSION,
    HELD_OUT,
    MAIN,
    SCHEMA,
    TEST,
    environment,
    rows,
)

__all__ = [
    "FORMAT_VERSION",
    "HELD_OUT",
    "MAIN",
    "SCHEMA",
    "TEST",
    "AlphaSummary",
    "Flag",
    "Paired",
    "Proportion",
    "choose_alpha",
    "environment",
    "flags",
    "read_records",
    "roles",
    "rounds",
    "rows",
    "splits",
    "summarize",
    "verdict",
    "write_records",
]
