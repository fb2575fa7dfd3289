"""Turns the reStructuredText of docstrings into Markdown for the site: roles, formulas and tables."""

import re
import textwrap

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(?:[^`<]*<)?~?([\w.]+)>?`")
MATHS = re.compile(r":math:`([^`]+)`")
FORMULA = re.compile(r"^\.\. math::((?:.*\n)(?:\n|[ \t]+.*(?:\n|\Z))*)", re.MULTILINE)
LITERAL = re.compile(r"::\n\n(?= )")
BORDER = re.compile(r"^[ \t]*=+(?: +=+)+ *$", re.MULTILINE)


def to_markdown(text: str) -> str:
    """Return a docstring in Markdown."""
    text = FORMULA.sub(lambda found: f"$$\n{textwrap.dedent(found[1]).strip()}\n$$\n\n", text)
    text = ROLE.sub(lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    text = MATHS.sub(r"$\1$", text)
    return _tables(LITERAL.sub(":\n\n", text))


def _tables(text: str) -> str:
    """Return text with simple tables, which stand between borders of equals signs, as pipe tables."""
    lines, found, borders = text.split("\n"), [], 0
    columns: list[slice] = []
    for line in lines:
        if BORDER.match(line):
            starts = [each.start() for each in re.finditer(r"=+", line)]
            columns = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
            borders = (borders + 1) % 3
            if borders == 2:
                found.append("|" + " --- |" * len(columns))
        elif borders:
            found.append("| " + " | ".join(line[column].strip() for column in columns) + " |")
        else:
            found.append(line)
    return "\n".join(found)


class Docstrings(griffe.Extension):
    """Applied to every object that is documented."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
