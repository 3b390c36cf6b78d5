"""The memory plans of the shipped configurations, written as comments into configs/ and as a table into docs/plan.md.

python -m medtrain.benchmarks.plan_table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medtrain.trainer.config.settings import load_config
from medtrain.trainer.plan.command import plan_config

ROOT = Path(__file__).resolve().parent.parent
RANKS = (8, 64, 128)  # 1, 8 and 16 nodes of 8
MEMORY_GIB = 79.0
BEGIN, END = "plan: begin", "plan: end"


def shipped() -> list[Path]:
    """The configurations of named models; the others plan for whatever model they are given."""
    return sorted((ROOT / "configs").glob("qwen2.5-*.yaml"))


def plans(file: Path) -> list[dict[str, Any]]:
    config = load_config(None, file)
    return [plan_config(config, world_size=ranks, gpu_memory_gib=MEMORY_GIB) for ranks in RANKS]


def between(text: str, inner: str, prefix: str) -> str:
    """``text`` with all between its line BEGIN and its line END replaced."""
    before, rest = text.split(f"{prefix}{BEGIN}\n", 1)
    after = rest.split(f"{prefix}{END}\n", 1)[1]
    return f"{before}{prefix}{BEGIN}\n{inner}{prefix}{END}\n{after}"


def comment(found: list[dict[str, Any]]) -> str:
    """What stands in a configuration's head: peak and verdict for each number of ranks, and a way out where it does not fit."""
    lines = [f"# `medtrain plan`, GiB a rank of {MEMORY_GIB:g}, allowance included (by formula, not measured on a GPU):"]
    for plan in found:
        most = plan["largest_micro_batch_tokens"]
        room = "" if most is None else f"; micro_batch_tokens up to {most:,}" if most < 2**20 else "; any micro_batch_tokens"
        verdict = f"fits{room}" if plan["fits"] else "DOES NOT FIT"
        ways = [f"{each['change']} ({each['peak_gib']:.1f})" for each in plan["alternatives"] if each["fits"]]
        way = f"; would: {', '.join(ways)}" if ways else ""
        lines.append(f"#   {plan['world_size']:>3} ranks: {plan['peak_gib']:6.1f}  {verdict}{way}")
    return "\n".join(lines) + "\n"


def table(all_plans: dict[str, list[dict[str, Any]]]) -> str:
    """The Markdown table of docs/plan.md."""
    names = ("weights", "gradients", "optimizer", "activations", "gathered weights", "reduce buffers", "allowance")
    lines = [
        f"| configuration | ranks | peak | {' | '.join(names)} | rest | fits {MEMORY_GIB:g} GiB |",
        "|---|---:|---:|" + "---:|" * (len(names) + 1) + "---|",
    ]
    for name, found in all_plans.items():
        for plan in found:
            parts = plan["parts_gib"]
            rest = sum(value for part, value in parts.items() if part not in names)
            values = [plan["peak_gib"], *(parts.get(part, 0.0) for part in names), rest]
            cells = " | ".join(f"{value:.1f}" for value in values)
            lines.append(f"| {name} | {plan['world_size']} | {cells} | {'yes' if plan['fits'] else '**no**'} |")
    return "\n".join(lines) + "\n"


def error_table(result: dict[str, Any]) -> str:
    """The Markdown table of the plan's errors from a plan-error-*.json."""
    lines = ["| case | ranks | measured MiB | planned MiB | error |", "|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        measured, planned = row["measured_bytes"]["peak"] / 2**20, row["planned_bytes"]["peak"] / 2**20
        lines.append(f"| {row['case']} | {row['ranks']} | {measured:.1f} | {planned:.1f} | {row['error']:+.1%} |")
    return "\n".join(lines) + "\n"


def newest_errors() -> Path:
    return max((ROOT / "benchmarks" / "results").glob("plan-error-cpu-*.json"))


def main() -> None:
    """Plan all and write the comments and the tables."""
    all_plans = {}
    for file in shipped():
        found = all_plans[file.stem] = plans(file)
        text = file.read_text(encoding="utf-8")
        file.write_text(between(text, comment(found), "# "), encoding="utf-8")
    doc = ROOT / "docs" / "plan.md"
    text = between(doc.read_text(encoding="utf-8"), "\n" + table(all_plans) + "\n", "[//]: # (configs) ")
    errors = json.loads(newest_errors().read_text(encoding="utf-8"))
    doc.write_text(between(text, "\n" + error_table(errors) + "\n", "[//]: # (errors) "), encoding="utf-8")


if __name__ == "__main__":
    main()
