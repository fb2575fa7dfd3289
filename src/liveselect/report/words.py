"""Numbers, and text of unknown origin, in readable form; the templates of the page use these as filters."""

import math

from markupsafe import Markup

_FLOP_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP", "YFLOP")
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), 0x202D, 0x202E], 0xFFFD)  # the last two reverse the direction of text

MINUS = "\u2212"


def visible(value: object) -> object:
    """Return a value as text with its control characters made visible; markup stays as it is."""
    if isinstance(value, Markup):
        return value
    return str(value).encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").translate(_VISIBLE)


def number(value: float | int | None, digits: int = 4) -> str:
    """Return a number with ``digits`` significant digits; integers in full, with thin spaces; None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "minus infinite")
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f").replace("-", MINUS)
    return f"{value:.{digits}g}".replace("-", MINUS)


def decimals(value: float, places: int = 2) -> str:
    """Return a number with a fixed count of decimals, so that those of a column align."""
    if not math.isfinite(value):
        return number(value)
    text = f"{value:.{places}f}"
    return text.replace("-", MINUS) if float(text) else text.replace("-", "")


def plural(count: int, noun: str) -> str:
    """Return how many of something there are, such as "3 rounds"."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def loss(value: float | None) -> str:
    """Return a loss in nats per token, three decimals."""
    return "–" if value is None else (f"{value:.3f}" if math.isfinite(value) else number(value)).replace("-", MINUS)


def percent(share: float) -> str:
    """Return a share of one as per cent; small ones keep a decimal, and only zero is shown as zero."""
    if not math.isfinite(share):
        return "–"
    if 0 < share < 0.0005:
        return "~0%"
    return f"{share:.0%}" if share == 0 or share >= 0.0995 else f"{share:.1%}"


def duration(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds, the two largest of them."""
    if not math.isfinite(seconds):
        return "–"
    if 0 < seconds < 0.05:
        return "~0 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds else "0 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def flops(amount: float) -> str:
    """Return floating point operations with the unit that keeps the number short."""
    if not math.isfinite(amount):
        return "–"
    unit = 0
    while abs(amount) >= 1000 and unit + 1 < len(_FLOP_UNITS):
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.3g} {_FLOP_UNITS[unit]}"


def place(axis: str, amount: float) -> str:
    """Return a place on an axis: ``step``, ``seconds`` or ``flops``."""
    if axis == "step":
        return f"{number(round(amount))} steps"
    return duration(amount) if axis == "seconds" else flops(amount)
