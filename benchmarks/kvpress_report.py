"""The Markdown result of against_kvpress.py."""

from typing import Any

from measure import machine_lines

from kvscope.units import format_length


def prefill_and_decode_s(sides: dict[str, Any], length_tokens: int) -> tuple[float, float]:
    """Return seconds that kvscope and kvpress took for one prompt of a length under all methods in one repetition.

    A mean over the prompts: what remains of the wall time when imports, model load, rows and report are left out.
    """
    rows = [row for row in sides["kvscope"]["rows"] if row["length_tokens"] == length_tokens]
    prefill_s = {row["sample"]: row["prefill_s"] for row in rows}
    own_s = (sum(prefill_s.values()) + sum(row["decode_s"] for row in rows)) / len(prefill_s)
    answers = [row for row in sides["kvpress"]["rows"] if row["length_tokens"] == length_tokens]
    return own_s, sum(row["answer_s"] for row in answers) / len(prefill_s)


def mean(rows: list[dict[str, Any]], method: str, column: str) -> float:
    """Return the mean of a column over a method's rows."""
    values = [row[column] for row in rows if row["method"] == method]
    return float(sum(values) / len(values))


def markdown(result: dict[str, Any]) -> list[str]:
    """Return the result as Markdown lines."""
    ratio, last = result["ratio"], result["repetitions"][-1]
    kvpress = last["kvpress"]
    packages = kvpress["packages"]
    lines = [
        "# kvscope against kvpress, accuracy pass end to end",
        "",
        f"kvpress takes **{ratio['median']:.2f}x** the wall time of kvscope (median of {len(ratio['repetitions'])} "
        f"alternating repetitions, {ratio['min']:.2f} to {ratio['max']:.2f}); target {result['target']}x in every "
        f"repetition: {'met' if result['target_met'] else 'NOT met'}.",
        "",
        "| repetition | kvscope, s | kvpress, s | ratio | load before |",
        "|---:|---:|---:|---:|---:|",
    ]
    for index, sides in enumerate(result["repetitions"], start=1):
        one, other = sides["kvscope"], sides["kvpress"]
        lines.append(
            f"| {index} | {one['wall_s']:.2f} | {other['wall_s']:.2f} | {sides['ratio']:.2f} | "
            f"{one['load_1min_before']:.2f} / {other['load_1min_before']:.2f} |"
        )
    most_batch = max(row.get("batch", 1) for row in last["kvscope"]["rows"])
    if most_batch == 1:
        lines += [
            "",
            "Without start-up and report (prefills and decodes only), one prompt under all methods:",
            "",
            "| repetition | length | kvscope, s | kvpress, s | ratio |",
            "|---:|---|---:|---:|---:|",
        ]
        for index, sides in enumerate(result["repetitions"], start=1):
            for length_tokens in result["lengths_tokens"]:
                own_s, their_s = prefill_and_decode_s(sides, length_tokens)
                length = format_length(length_tokens)
                lines.append(f"| {index} | {length} | {own_s:.2f} | {their_s:.2f} | {their_s / own_s:.2f} |")
    else:
        lines += ["", f"kvscope's answers share steps, up to {most_batch} of them: no answer has a time of its own."]
    lines += [
        "",
        "The two sides do the same task (last repetition):",
        "",
        "| kvscope method | kvpress press | equal answers | score kvscope / kvpress | KV kept | decoded tokens |",
        "|---|---|---|---:|---:|---:|",
    ]
    presses = zip(last["same_answers"].items(), result["kvscope_methods"], result["kvpress_presses"], strict=True)
    for (name, equal), spec, press in presses:
        scores = [mean(last[side]["rows"], name, "score") for side in ("kvscope", "kvpress")]
        kept = [mean(last[side]["rows"], name, "kept_fraction") for side in ("kvscope", "kvpress")]
        tokens = [
            sum(row["decode_tokens"] for row in last[side]["rows"] if row["method"] == name)
            for side in ("kvscope", "kvpress")
        ]
        lines.append(
            f"| {spec} | {press} | {equal} | {scores[0]:.2f} / {scores[1]:.2f} | {kept[0]:.1%} / {kept[1]:.1%} | "
            f"{tokens[0]} / {tokens[1]} |"
        )
    listed = (
        "is on kvpress's list of models"
        if kvpress["in_supported_models"]
        else "is not on kvpress's list of models: it warns that it is not tested, and works"
    )
    lines += [
        "",
        "- Each side is one fresh process, timed from start to end: imports, model load, every answer. kvscope also",
        "  builds the prompts, writes its rows and draws its report inside that time; kvpress gets the prompts as ids.",
        "- kvpress runs its own pipeline, which prefills the prompt again for every press; kvscope prefills it once.",
        "  The split is the same: all but the last prompt token is prefilled, the last one is fed after compression.",
        "- Greedy; an answer ends at a newline or the end of the sequence on both sides, "
        f"{result['max_new_tokens']} tokens at most. kvpress's pipeline does not look at the first token.",
        "- KV kept counts whole pages of 64 tokens in kvscope, tokens in kvpress; the request is the same fraction.",
        "- dense and recency keep the same tokens on both sides. sliding_window moves its sinks (cache-relative",
        "  positions), StreamingLLMPress does not; random draws chunks behind a recency window, RandomPress tokens.",
        f"- {result['samples']} prompts of {result['task']} a length; seed {result['seed']}; model {result['model']} "
        f"({kvpress['model_class']}), {result['dtype']} on both sides; the architecture {listed}",
        *machine_lines(result["environment"]),
        f"- kvpress {packages['kvpress']}, Python {kvpress['python']}, torch {packages['torch']}, transformers "
        f"{packages['transformers']}, {kvpress['torch_threads']} torch threads",
        f"- `{result['command']}`",
    ]
    return lines
