"""What images/lock.py wrote, read again."""


def parse(text: str) -> dict[str, tuple[str, list[str]]]:
    """package → (version, SHA-256 of its files) of a list of images/requirements."""
    found: dict[str, tuple[str, list[str]]] = {}
    for entry in text.replace("\\\n", " ").splitlines():
        if not entry.startswith("#"):
            pin, *options = entry.split()
            name, _, version = pin.partition("==")
            found[name] = version, [option.removeprefix("--hash=sha256:") for option in options]
    return found
