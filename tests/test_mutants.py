"""The faults that `mutants.py` puts into the tree stand where it looks for them; whether tests see them, it says."""

from tests import mutants


def test_every_replacement_matches_once() -> None:
    assert not mutants.misplaced()
    assert len({one.name for one in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 40
    assert all(one.before != one.after for one in mutants.MUTANTS)


def test_every_selection_names_files() -> None:
    for one in mutants.MUTANTS:
        files = [word for word in one.tests.split() if word.endswith(".py")]
        assert files and all((mutants.ROOT / "tests" / file).is_file() for file in files), one.name
