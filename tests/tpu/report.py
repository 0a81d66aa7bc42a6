"""Writes README.md beside this file: every step compiled for every chip.

python tests/tpu/report.py
"""

from __future__ import annotations

import pathlib

import aot
import steps

from keras_adam import rows

HEAD = """\
# Steps compiled for TPUs

By `python tests/tpu/report.py`, with the versions of the extra `tpu`, on a machine
without a TPU: nothing here was executed. Tables have {rows:,} rows, batches {ids:,}
ids. `aliased` is the share of the state's bytes that a step updates where they are
(above 1 where layouts pad); `temporaries` are beside arguments and results; `copies`
are of whole tables, or dense variables, into another layout.

| step | chip | compiled in | aliased | temporaries | copies |
|---|---|---:|---:|---:|---:|
"""


def main() -> None:
    rows.on_tpu = lambda: True
    lines = []
    for name, make in steps.STEPS.items():
        for chip in aot.CHIPS:
            program = make()
            compiled = aot.compile_for(chip, program.f, *program.args)
            copies = sum(compiled.copies(*shape) for shape in program.tables)
            lines.append(
                f"| {name} | {chip} | {compiled.seconds:.1f} s "
                f"| {compiled.alias_bytes / program.state_bytes:.3f} "
                f"| {compiled.temporary_bytes / 1e6:,.2f} MB | {copies} |\n"
            )
            print(lines[-1], end="", flush=True)
    head = HEAD.format(rows=steps.ROWS, ids=steps.IDS)
    pathlib.Path(__file__).with_name("README.md").write_text(head + "".join(lines))


if __name__ == "__main__":
    main()
