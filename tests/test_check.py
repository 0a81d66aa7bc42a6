"""The committed tables show what examples/README.md says of check.py's claims."""

import pathlib
import shutil

import check
import numpy as np
import pytest

PAPER = pathlib.Path(check.__file__).with_name("paper")


def test_claims_hold():
    claims = check.claims(PAPER)
    assert len(claims) == 18
    wrong = {claim.says for claim in claims if not claim.holds}
    # README says so too.
    assert wrong == {
        f"IMDB, {form}: last loss of Adam over SGDNesterov's"
        for form in ("dense", "words", "counts")
    }


@pytest.mark.parametrize(
    "table, curve, loss, says",
    [
        ("imdb_bow.csv", "dense,Adam,", 0.3, "IMDB, dense: last loss of Adam over Ada"),
        (
            "imdb_bow.csv",
            "dense | dropout=0.0,Adam,",
            0.063,
            "IMDB, dense without dropout: last loss of Adam over SGDN",
        ),
        (
            "mnist_vae.csv",
            'beta_1=0 beta_2=0.9999,"Adam, uncorrected",',
            70,
            "VAE, beta_1=0 beta_2=0.9999",
        ),
    ],
)
def test_claims_can_fail(tmp_path, table, curve, loss, says):
    shutil.copytree(PAPER, tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / table).read_text().splitlines()
    for i, line in enumerate(lines):
        if line.startswith(curve):
            *others, _, seconds = line.split(",")
            lines[i] = ",".join([*others, str(loss), seconds])
    (tmp_path / table).write_text("\n".join(lines))
    (claim,) = (c for c in check.claims(tmp_path) if c.says.startswith(says))
    assert not claim.holds


def test_regret_can_fail(tmp_path):
    shutil.copytree(PAPER, tmp_path, dirs_exist_ok=True)
    line = "\n".join(f"dense,Adam,{t},{t**0.6}" for t in range(10, 1000, 10))
    (tmp_path / "regret.csv").write_text(f"problem,method,steps,regret\n{line}\n")
    *_, slope, late = check.claims(tmp_path)
    assert not slope.holds and abs(slope.figure - 0.6) < 1e-9
    assert not late.holds


def test_regret_that_is_linear_after_a_costly_start_can_fail():
    at = np.unique(np.geomspace(10, 10_000, 60).astype(int))
    values = np.where(at < 1000, 30 * np.sqrt(at), 949 + 0.3 * (at - 1000))
    assert check.regret.slope(at, values) < 0.67
    assert 1.5 < check.late_growth(at, values) < 2
    assert abs(check.late_growth(at, 3 * np.sqrt(at)) - 1) < 1e-9


def test_only_one_run_is_judged(tmp_path):
    """At the rate that was tuned, wherever it stands."""
    shutil.copytree(PAPER, tmp_path, dirs_exist_ok=True)
    table = tmp_path / "imdb_bow.csv"
    before = [claim.figure for claim in check.claims(PAPER)]
    with open(table, "a") as file:
        file.write("dense,Adam,0.03,160,128,25000,0,160,9,1\n")
    assert [claim.figure for claim in check.claims(tmp_path)] == before
    with open(table, "a") as file:
        file.write("dense,Adam,0.1,160,16,500,1,160,9,1\n")
    with pytest.raises(SystemExit, match=r"one batch size, limit and seed.*16, 500, 1"):
        check.claims(tmp_path)
    table.write_text(f"{table.read_text().splitlines()[0]}\n")
    with pytest.raises(SystemExit, match=r"Received: \[\]"):
        check.claims(tmp_path)


def test_missing_table(tmp_path):
    with pytest.raises(SystemExit, match=r"imdb_bow\.csv"):
        check.claims(tmp_path)
