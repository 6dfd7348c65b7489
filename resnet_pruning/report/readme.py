"""Write the numbers of README.md and docs/results.md from the CSVs in ``figures/``: ``make readme``.

The text between ``<!-- begin:NAME -->`` and ``<!-- end:NAME -->`` is what the function NAME in `BLOCKS` returns.
"""

import re
from collections.abc import Callable
from pathlib import Path

from ..files import ROOT, written_whole
from . import tables as tables
from .findings import finding, in_short, notebooks

FILES = ("README.md", "docs/results.md")
BLOCKS: dict[str, Callable[[Path], str]] = {"in_short": in_short, "finding": finding, "notebooks": notebooks} | {
    f.__name__: f for f in tables.TABLES
}


def filled(text: str, figures: Path) -> str:
    """`text` with the content of each block replaced by a new one.

    Raises
    ------
    ValueError : a block with an unknown name, or one that is not closed
    """

    def content(match: re.Match) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"block {name!r}, expected one of {', '.join(BLOCKS)}")
        return f"<!-- begin:{name} -->\n{unbroken(BLOCKS[name](figures))}\n<!-- end:{name} -->"

    pattern = r"<!-- begin:(?P<name>\w+) -->\n.*?<!-- end:(?P=name) -->"
    if len(re.findall(pattern, text, re.DOTALL)) != text.count("<!-- begin:"):
        raise ValueError("a block is not closed: each <!-- begin:NAME --> needs its <!-- end:NAME -->")
    return re.sub(pattern, content, text, flags=re.DOTALL)


def unbroken(text: str) -> str:
    """`text` with no-break spaces between numbers and units, and inside ranges, which would otherwise be torn apart in narrow columns."""
    text = re.sub(r"(?<=\d) (?=(?:%|pp|kB|M|k|ms|s|min)(?!\w))", "\u00a0", text)
    return re.sub(r"(?<=\d) to (?=[-+]?\d)", "\u00a0to\u00a0", text)


def main() -> None:
    for name in FILES:
        path = ROOT / name
        text = filled(path.read_text(encoding="utf-8"), ROOT / "figures")
        with written_whole(path) as partial:
            partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
