"""For which code a result stands."""

import json

import pytest
from track_samples import CPU, config, ok, record

from openpi_opt.config import Config
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.knobs.base import Knob, Options
from openpi_opt.paths import package_dir
from openpi_opt.result import Ok
from openpi_opt.track import identity
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash, source_hash
from openpi_opt.track.journal import Journal

OPTIONS = '''class BlasOptions(Options):
    """Text."""

    # About the option.
    library: str = "a"

    def used(self) -> bool:
        return True


HERE = 1
'''


def with_files(files: dict[str, str]) -> Ok:
    return ok().model_copy(update={"files": files})


def test_files_that_are_what_they_were_answer(tmp_path):
    same = identity.content_hash(package_dir() / "kernels" / "attention.py")
    assert identity.changes(with_files({"kernels/attention.py": same})) == []
    changed = with_files({"kernels/attention.py": "0" * 12, "gone.py": same})
    assert identity.changes(changed) == ["kernels/attention.py", "gone.py"]
    assert identity.changes(with_files({identity.WHOLE: source_hash()})) == []
    assert identity.changes(with_files({identity.WHOLE: "0" * 12})) == [identity.WHOLE]


def test_the_order_of_a_trials_own_knobs_counts_and_other_knobs_do_not(monkeypatch):
    cfg = config(attention={"vision": "sdpa"})
    registry = identity.imported(cfg)["knobs/__init__.py"]
    assert registry == "precision attention"
    trial = with_files({"knobs/__init__.py": registry})

    class Other(Knob[Options]):
        name = "other"
        options_type = Options

    monkeypatch.setattr(identity, "KNOBS", (Other(), *KNOBS))
    assert identity.changes(trial) == []
    monkeypatch.setattr(identity, "KNOBS", tuple(reversed(KNOBS)))
    assert identity.changes(trial) == ["knobs/__init__.py"]


def test_only_knobs_that_act_are_part_of_it():
    plain, other = (
        identity.imported(config()),
        identity.imported(config(blas={"library": "cublas"})),
    )
    assert "knobs/blas.py" not in plain
    assert "knobs/blas.py" in other
    assert {"knobs/precision.py", "config.py", "track/identity.py"} <= plain.keys()


def test_declared_options_are_no_code(tmp_path):
    file = tmp_path / "knob.py"

    def digest(text: str) -> str:
        file.write_text(text)
        return identity.content_hash(file)

    before = digest(OPTIONS)
    added = OPTIONS.replace(
        '    library: str = "a"\n', '    library: str = "a"\n    new: int = 1\n'
    )
    assert digest(added) == before
    assert digest(OPTIONS.replace("True", "False")) != before
    assert digest(OPTIONS.replace("HERE = 1", "HERE = 2")) != before
    assert digest(OPTIONS.replace("(Options)", "(Other)")) != before


def test_a_new_knob_or_option_changes_no_hash(monkeypatch):
    """The values are those of the first results of format 3."""
    cfg = config(attention={"vision": "sdpa"})
    assert (config().hash(), cfg.hash()) == ("a916e8012c9e", "34507208a0a7")
    assert cfg.context_hash() == "09593186f51a"
    document = cfg.dump()
    assert Config.load(document).hash() == cfg.hash()
    assert config(attention={}, workload={"name": "another label"}).hash() == config().hash()


def test_a_changed_default_is_not_answered_by_what_was_the_default():
    """The record's own values decide, whatever its hash says."""
    other = with_files({}).model_copy(update={"config": config(graph={"mode": "manual"}).dump()})
    assert identity.changes(other) == ["a default of its options"]


def test_earlier_formats_are_found_under_todays_hashes_and_say_that_they_are_older(tmp_path):
    item = record(ok(cfg=config(attention={"vision": "sdpa"})))
    document = json.loads(item.model_dump_json())
    document["result"] |= {"schema_version": 2, "config_hash": "cda2d1ef793c", "context_hash": "x"}
    del document["result"]["files"]
    document |= {"number": 0, "fingerprint_hash": "0123456789ab"}
    journal = Journal.open(tmp_path)
    journal.path.write_text(json.dumps(document) + "\n")
    cfg, machine = config(attention={"vision": "sdpa"}), fingerprint_hash(fingerprint(CPU))
    found = Journal.read(tmp_path).find(cfg.hash(), machine)
    assert found is not None
    assert found.result.context_hash == cfg.context_hash()
    assert identity.changes(found.result) == [identity.OLDER]


def test_earlier_formats_whose_options_are_gone_are_still_read(tmp_path):
    item = ok().model_copy(update={"schema_version": 2, "config": {"knobs": {"gone": {}}}})
    assert identity.renewed(item) is item
    assert identity.changes(item) == [identity.OLDER]


def test_a_line_names_what_changed_most_first():
    changed = [["a.py"], ["b.py", "a.py"], [identity.OLDER]]
    assert identity.summary(changed) == f"a.py, b.py changed; {identity.OLDER}"
    assert identity.summary([list("abcde")]) == "a, b, c and 2 more changed"
    assert identity.summary([[identity.WHOLE]]) == "the package changed"


def test_a_trial_that_died_stands_for_what_it_had_imported(tmp_path):
    assert identity.noted(tmp_path) == {identity.WHOLE: source_hash()}
    identity.note_imported(config(), tmp_path)
    assert identity.noted(tmp_path) == identity.imported(config())


@pytest.mark.parametrize("knob", BY_NAME)
def test_a_knob_at_its_defaults_is_not_applied(knob):
    assert BY_NAME[knob].acts(config()) == (knob == "precision")
