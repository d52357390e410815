"""Schedules of CronJobs: five fields, or a word, as robfig/cron reads them."""

import re

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, start=1)}),
    ("day of the week", 0, 6, {name: number for number, name in enumerate(_DAYS)}),
)
_WORDS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_DURATION = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h))+|0")


def schedule(text: str) -> str:
    """What is wrong with a schedule, or nothing."""
    if "TZ" in text:
        return "names a time zone: use timeZone"
    if text.startswith("@"):
        if text.startswith("@every "):
            every = text.removeprefix("@every ")
            return "" if _DURATION.fullmatch(every) else f"{every!r} is no duration, as 1h30m"
        return "" if text in _WORDS else f"is none of {', '.join(_WORDS)}, @every"
    fields = text.split()
    if len(fields) != len(_FIELDS):
        return f"has {len(fields)} fields, not five"
    for field, (name, least, most, names) in zip(fields, _FIELDS, strict=True):
        for part in field.split(","):
            if part and (wrong := _range(part, least, most, names)):
                return f"{name} {field}: {wrong}"
    return ""


def _range(text: str, least: int, most: int, names: dict[str, int]) -> str:
    """`*`, `3`, `1-5`, `*/2`, `1-9/2`, `?`."""
    span, slash, step = text.partition("/")
    ends = span.split("-")
    if "/" in step or len(ends) > 2:
        return "too many / or -"
    if ends[0] in ("*", "?"):
        numbers = [least, most]
    else:
        numbers = [names.get(end.lower(), int(end) if end.isdecimal() and end.isascii() else -1) for end in ends]
    if slash and not (step.isdecimal() and step.isascii() and int(step) > 0):
        return f"{step or 'nothing'} is no step"
    if min(numbers) < least or max(numbers) > most:
        return f"must be between {least} and {most}"
    return "begins after its end" if numbers[0] > numbers[-1] else ""
