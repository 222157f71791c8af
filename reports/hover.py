"""What a point says where the pointer is on it: a title within the SVG, which browsers show without any script.

matplotlib has no titles of points, but writes a group's id as it is given: a text goes there, and becomes the title
when the SVG is written.
"""

import re

from kvscope.results.plain_text import shortened, visible

_MARK = "tip:"
_MOST_CHARS = 300
_GROUP = re.compile(rf'<g id="{_MARK}([^"]*)"')


def tip(text: str) -> str:
    """Return the group id that becomes the title `text`."""
    return _MARK + shortened(visible(text), most=_MOST_CHARS)


def with_titles(svg: str) -> str:
    """Return an SVG whose groups of such ids have titles instead; matplotlib has escaped their texts."""
    # The id ends the tag or other attributes follow; the title is the first thing within.
    return re.sub(_GROUP.pattern + r"([^>]*)>", r'<g class="tip"\2><title>\1</title>', svg)
