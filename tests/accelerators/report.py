"""Writes README.md beside this file: every step compiled for every chip.

python tests/accelerators/report.py
"""

from __future__ import annotations

import pathlib

import aot
import jax_steps
import steps

from keras_adam import rows

HEAD = """\
# Steps compiled for TPUs and a GPU

By `python tests/accelerators/report.py`, with the versions of the extra `accelerators`,
on a machine with neither: nothing here was executed. Tables have {rows:,} rows, batches
{ids:,} ids. `aliased` is the share of the state's bytes that a step updates where they
are (above 1 where layouts pad, or with what not every step writes); `temporaries` are
beside arguments and results; `copies` are of whole tables, or dense variables.

| step | chip | compiled in | aliased | temporaries | copies |
|---|---|---:|---:|---:|---:|
"""


def line(
    name: str, chip: str, seconds: float, aliased: float, temporary: float, copies: int
) -> str:
    return (
        f"| {name} | {chip} | {seconds:.1f} s | {aliased:.3f} "
        f"| {temporary / 1e6:,.2f} MB | {copies} |\n"
    )


def main() -> None:
    rows.on_accelerator = lambda: True
    lines = []
    for name, make in steps.STEPS.items():
        for chip in aot.CHIPS:
            rows.on_tpu = lambda chip=chip: chip in aot.TPUS
            program = make()
            compiled = aot.compile_for(chip, program.f, *program.args)
            copies = sum(compiled.copies(*shape) for shape in program.tables)
            aliased = compiled.alias_bytes / program.state_bytes
            temporary = compiled.temporary_bytes
            lines.append(line(name, chip, compiled.seconds, aliased, temporary, copies))
            print(lines[-1], end="", flush=True)
    for x in jax_steps.run():
        aliased = x["alias_bytes"] / x["state_bytes"]
        figures = x["seconds"], aliased, x["temporary_bytes"], x["copies"]
        lines.append(line(x["name"], x["chip"], *figures))
        print(lines[-1], end="", flush=True)
    head = HEAD.format(rows=steps.ROWS, ids=steps.IDS)
    pathlib.Path(__file__).with_name("README.md").write_text(head + "".join(lines))


if __name__ == "__main__":
    main()
