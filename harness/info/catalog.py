"""What ``kvscope list`` and ``kvscope show`` print about methods, tasks and models."""

import re
import textwrap
from typing import Any

from kvscope.harness.info.catalog_entries import entries, show_entry
from kvscope.terminal import folded, grid

TEXT_WIDTH = 100


def list_text(kind: str, *, width: int | None = None) -> str:
    """Return the names of a kind, each with one clause; lines have at most ``width`` columns, None for any."""
    rows = entries(kind)
    room = max(len(row["name"]) for row in rows)
    if kind != "methods":
        texts = [f"{row['name']:<{room}}  {row.get('fault') or row['description']}" for row in rows]
        return folded("\n".join(texts), width, hang=room + 2)
    cells = [METHOD_COLUMNS, *(_method_cells(row) for row in rows if "fault" not in row)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    faults = [f"{row['name']:<{widths[0]}}  {row['fault']}" for row in rows if "fault" in row]
    if width is not None and sum(widths) + 2 * len(widths) > width:
        table = grid(cells[1:], METHOD_COLUMNS, aligned=["left"] * len(METHOD_COLUMNS), width=width)
        return "\n".join([table, *(folded(fault, width, hang=widths[0] + 2) for fault in faults)])
    lines = ["  ".join(f"{cell:<{each}}" for cell, each in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, *faults])


METHOD_COLUMNS = ("method", "training", "saves", "chosen", "source", "what stays on the device")
SAVES = {"freed": "bytes", "offloaded": "bytes, to host memory"}


def _method_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return a method's line of the list: what has to be trained, what it saves, when it chooses, whence it comes."""
    from kvscope.methods.base import CacheMethod

    reads_all = entry["reads"] == CacheMethod.reads
    saves = SAVES.get(entry["saving_kind"]) or ("nothing" if reads_all else "reads")
    chosen = "while decoding" if entry["through_decode"] else "once" if saves != "nothing" else "-"
    paper = re.search(r"arXiv [\d.]+\d", entry["source"])
    return (
        entry["name"],
        entry["needs_training"],
        saves,
        chosen,
        paper[0] if paper else re.split(r"[,;(]", entry["source"])[0].strip(),
        entry["stays"],
    )


def show_text(name: str) -> str:
    """Return everything known of a method, task or model.

    Raises:
        UsageError: no method, task or model has that name.
    """
    entry = show_entry(name)
    return {"method": _method_text, "task": _task_text, "model": _model_text}[entry.pop("kind")](entry)


def _method_text(entry: dict[str, Any]) -> str:
    lines = [
        f"{entry['name']} (cache method)",
        *_clause("stays on the device", entry["stays"]),
        *_clause("a query reads", entry["reads"]),
        *_clause("saves", entry["saves"]),
        *_clause("the rest is", REST[entry["saving_kind"]]),
        *_clause("bytes kept and read", entry["cost"]),
        *_clause("chosen", CHOSEN[entry["through_decode"]]),
        *_clause("needs training", entry["needs_training"]),
        *_clause("source", entry["source"]),
    ]
    if entry["trained_indexers"]:
        lines += _clause("trained indexers", ", ".join(entry["trained_indexers"]))
    if entry["kv_refusal"]:
        lines += _clause("in fewer bits (kv=)", f"no: {entry['kv_refusal']}")
    options = entry["options"]
    lines.append("  options" if options else "  options               none")
    for option in options:
        lines.append(f"    {option['name']} ({option['type']}, default {_value_text(option['default'])})")
        lines += textwrap.wrap(option["meaning"], TEXT_WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    if entry["automatic"]:
        lines.append("  in use by default, by prompt length (every row holds the values of its own)")
    for length, values in entry["automatic"].items():
        text = ", ".join(f"{key}={_value_text(value)}" for key, value in values.items())
        lines += textwrap.wrap(text, TEXT_WIDTH + 24, initial_indent=f"    {length:<6} ", subsequent_indent=" " * 11)
    example = f"{options[0]['name']}=..." if options else ""
    lines.append(f"  use                   -m {entry['name']}{':' + example if example else ''}")
    return "\n".join(lines)


def _clause(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, TEXT_WIDTH + 24, initial_indent=f"  {name:<22}", subsequent_indent=" " * 24)


CHOSEN = {False: "once, when the prompt ends", True: "anew while decoding"}
REST = {
    "resident": "nothing: every token stays on the device",
    "freed": "freed: it is gone and cannot come back",
    "offloaded": "offloaded: it waits in pinned host memory and can be recalled",
}


def _value_text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return str(value) if value.is_integer() else f"{value:.3g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _task_text(entry: dict[str, Any]) -> str:
    lines = [
        f"{entry['name']} (task)",
        f"  asks for   {entry['description']}",
        f"  source     {entry['source']}",
    ]
    for option in entry["options"]:
        lines.append(f"  option     {option['name']}")
        lines += textwrap.wrap(option["meaning"], TEXT_WIDTH, initial_indent=" " * 13, subsequent_indent=" " * 13)
    lines.append(f"  use        --task {entry['name']}")
    return "\n".join(lines)


def _model_text(entry: dict[str, Any]) -> str:
    lines = [f"{entry['name']} (model)", f"  what       {entry['description']}"]
    if "fault" in entry:
        return "\n".join([*lines, f"  shape      not known here: {entry['fault']}"])
    lines += [
        f"  layers     {entry['layers']}, {entry['full_attention_layers']} with full attention",
        f"  heads      {entry['query_heads']} query, {entry['kv_heads']} KV, {entry['head_dim']} wide",
        f"  KV cache   {entry['kv_bytes_per_token']:,} bytes a token in {entry['dtype']}",
        f"  context    {entry['max_length_tokens']:,} tokens at most",
        f"  use        --model {entry['name']}",
    ]
    return "\n".join(lines)
