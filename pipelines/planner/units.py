"""Bytes and seconds as people read them."""


def gigabytes(count: float) -> str:
    """`4.1 GB`, `950 MB`, `1,099.5 GB`, `32.0 TB`."""
    if count >= 10**13:
        return f"{count / 10**12:.1f} TB"
    return f"{count / 10**9:,.1f} GB" if count >= 10**9 else f"{count / 10**6:.0f} MB"


def hours(seconds: float) -> str:
    """`40 min`, `9.5 h`, `3.2 d`."""
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"
