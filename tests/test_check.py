"""The committed tables show what examples/README.md says of them."""

import pathlib
import shutil

import check
import pytest

PAPER = pathlib.Path(check.__file__).with_name("paper")


def test_claims_hold():
    claims = check.claims(PAPER)
    assert len(claims) == 12
    wrong = {claim.says for claim in claims if not claim.holds}
    # README says so too.
    assert wrong == {
        f"IMDB, {form}: last loss of Adam over SGDNesterov's"
        for form in ("dense", "words")
    }


@pytest.mark.parametrize(
    "table, curve, loss, says",
    [
        ("imdb_bow.csv", "dense,Adam,", 0.3, "IMDB, dense: last loss of Adam over Ada"),
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
    *_, claim = check.claims(tmp_path)
    assert not claim.holds and abs(claim.figure - 0.6) < 1e-9


def test_missing_table(tmp_path):
    with pytest.raises(SystemExit, match=r"imdb_bow\.csv"):
        check.claims(tmp_path)
