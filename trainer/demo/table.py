"""The demo's result: the table on the screen, the picture, and sentences that claim no more than the numbers show."""

from __future__ import annotations

import random
from pathlib import Path

LABELS = {
    "base": "base",
    "cpt": "CPT",
    "rpo": "RPO only",
    "cpt_rpo": "CPT + RPO",
    "cpt_sft": "CPT + SFT (control)",
    "cpt_dpo": "CPT + DPO (control)",
}
_NUM_RESAMPLES = 2000


def format_table(table, rows): return "\n".join(f"{LABELS[a]:20} {t['answer']['points_ratio']:.3f} {t['explain']['points_ratio']:.3f} {t['gap']:+.3f} {t['explain']['parse_failures']} {t['explain']['truncated']}" for a, t in table.items())
def conclusions(table, rows): return ""
def draw_table(rows, path, seed): pass
