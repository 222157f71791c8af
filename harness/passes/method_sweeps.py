"""``--sweep method.option=value,value``: one method for each of several values of an option."""

import re
from collections.abc import Sequence

from kvscope.errors import UsageError, shown
from kvscope.specs import Spec, parse_spec, split_items, unquoted

_PATTERN = re.compile(r"([^=]+)\.([A-Za-z_]\w*)\s*=(.+)", re.DOTALL)


def sweep_methods(methods: Sequence[object], sweeps: Sequence[str]) -> tuple[Spec, ...]:
    """Replace every method that a sweep names by one for each of the sweep's values.

    Several sweeps of one method give every combination. A sweep wins over the option in the method's own spec.

    Args:
        methods: specs as asked for, in any of their forms.
        sweeps: items such as ``lsa.threshold=0.3,0.5,0.7``; a method from outside is ``package.module:Class.option=``.

    Raises:
        UsageError: a malformed item, or a method that is not among ``methods``.
    """
    found = [parse_spec(each, kind="method") for each in methods]
    seen = set()
    for item in sweeps:
        match = _PATTERN.fullmatch(item.strip())
        values = [unquoted(text.strip()) for text in split_items(match[3])] if match else []
        if match is None or not all(values):
            raise UsageError(
                f"--sweep {shown(item)} is not method.option=value,value: write for example --sweep "
                "lsa.threshold=0.3,0.5."
            )
        swept, option = match[1].strip(), match[2]
        if (swept, option) in seen:
            raise UsageError(f"--sweep {swept}.{option} is given twice: write all values in one, as in value,value.")
        seen.add((swept, option))
        names = list(dict.fromkeys(spec.name for spec in found))
        if swept not in names:
            raise UsageError(
                f"--sweep {shown(item)} names method {shown(swept)}, which is not among the methods "
                f"({', '.join(names)}): add -m {swept}."
            )
        found = [
            each
            for spec in found
            for each in ([spec.with_option(option, value) for value in values] if spec.name == swept else [spec])
        ]
    return tuple(found)
