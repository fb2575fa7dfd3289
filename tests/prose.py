"""Finds words and phrases in documents and messages that a native-speaking engineer would not write.

    python tests/prose.py [FILE ...]

prints each one with its place and what to write, and fails if there is any. Code blocks are left out.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PHRASES = {
    r"(?<!cannot )\btells?\b|\btold\b": "who says it? `reports`, `shows`, `prints`, `a warning says`",
    r"\bheard\b|\bdeaf\b|\bhearing\b": "`captured`, `disabled`",
    r"\banew\b": "`again`",
    r"\bso many\b|\ba whole lot\b": "a number, or `up to N`",
    r"\bwho[ms]?ever\b|\bwhatever\b": "name the noun",
    r"\bhad from\b": "`from`",
    r"\bthat lacks?\b": "`that is missing`",
    r"\bin order to\b": "`to`",
    r"\b(?:simply|basically|obviously|actually|essentially|of course|really|quite)\b": "leave it out",
    r"\b(?:should|must|can) be noted\b|\bnote that\b": "say it without the announcement",
    r"\butili[sz]\w+": "`use`",
    r"\bis able to\b": "`can`",
    r"\bas(?: it)? is the case (?:for|with)\b": "`like`",
}
"""A pattern, and what to write."""

BIT_FOR_BIT = re.compile(r"to the bit")
MOST_BITS = 2
"""How often a page of prose (tables aside) may say `to the bit`: said once, it holds for the page."""


def documents() -> list[Path]:
    """Return the documents that people read."""
    folders = [ROOT, ROOT / "docs", ROOT / "docs/how-to", ROOT / "docs/tutorials", ROOT / "docs/api", ROOT / "examples"]
    return [path for folder in folders for path in sorted(folder.glob("*.md"))]


def without_code(text: str) -> str:
    """Return a document with its code blanked, so that lines keep their numbers."""
    blank = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
    return blank.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def faults(path: Path) -> Iterator[str]:
    """Yield what is wrong in a document, each with its line."""
    text = without_code(path.read_text(encoding="utf-8"))
    for pattern, advice in PHRASES.items():
        for found in re.finditer(pattern, text, re.IGNORECASE):
            line = text.count("\n", 0, found.start()) + 1
            yield f"{path.relative_to(ROOT)}:{line}: {found[0]!r}: {advice}"
    prose = "\n".join(line for line in text.split("\n") if not line.startswith("|"))
    if (count := len(BIT_FOR_BIT.findall(prose))) > MOST_BITS:
        yield f"{path.relative_to(ROOT)}: 'to the bit' {count} times, at most {MOST_BITS}: say once what is exact"


def main(paths: Iterable[Path]) -> int:
    """Print all faults; return 1 if there are any."""
    found = [fault for path in paths for fault in faults(path.resolve())]
    for fault in found:
        print(fault)  # noqa: T201
    return bool(found)


if __name__ == "__main__":
    sys.exit(main([Path(each) for each in sys.argv[1:]] or documents()))
