"""A check that every generator makes."""


def check_count(n: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
