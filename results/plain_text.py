"""Text of a run folder as it may be shown: nothing in it steers a terminal, or turns the reading order."""

import re

# C0 and C1 controls, lone surrogates, and what is not seen but changes what is: directions, joiners, separators.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""Return text on one line, with every control character written as an escape: `\n`, `\x1b`, `\u202e`."""
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def shortened(text: str, *, most: int) -> str:
    """Return at most `most` characters of text: its start and its end, where labels tend to differ."""
    if len(text) <= most:
        return text
    head = (most - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
