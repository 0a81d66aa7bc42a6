"""Mutants that are no faults: (file, function, before, after), and why."""

EQUIVALENT: dict[tuple[str, str, str, str], str] = {}
