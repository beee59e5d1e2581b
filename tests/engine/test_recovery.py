"""What a sweep leaves that was killed, or that gave its trials up, at the worst moments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from search_samples import CPU, ok

from openpi_opt.config import Config
from openpi_opt.engine.display import Display
from openpi_opt.engine.ledger import Ledger
from openpi_opt.engine.plan import StudyRequest
from openpi_opt.engine.recovery import Started, recover
from openpi_opt.process import locks
from openpi_opt.process.locks import Claims, Controllers, Held
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import Space
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.store import Store

CFG = Config.parse({"weights": {"seed": 3}})
UID = "0123456789abcdef" * 2
SEEN = fingerprint(CPU)
REQUEST = StudyRequest("s", Space.parse([]), Settings(), CPU)


class Study:
    """One study and this sweep on it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.journal = Journal.open(folder)
        self.controllers = Controllers(folder)
        self.claims = Claims(folder)
        self.said: list[str] = []

    def begin(self, controller: str) -> tuple[Path, Held]:
        """A trial of `controller`, as it is before its process starts."""
        started = Started(
            uid=UID,
            controller=controller,
            role="trial",
            params={},
            space="s",
            config_hash=CFG.hash(),
            context_hash=CFG.context_hash(),
            fingerprint=SEEN,
            fingerprint_hash=fingerprint_hash(SEEN),
        )
        trial = self.folder / "trials" / UID[:12]
        return trial, started.write(trial)

    def recover(self) -> list[Record]:
        with self.controllers.alone():
            return recover(
                self.folder, self.journal, self.controllers, self.claims, self.said.append
            )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "study")


def finish(trial: Path) -> None:
    (trial / "config.json").write_text(json.dumps(CFG.dump()))
    (trial / "result.json").write_text(ok(CFG, 7.0).model_dump_json())


def test_what_a_living_sweep_gave_up_is_taken_and_what_it_holds_is_left(study: Study) -> None:
    """At Ctrl-C the trial's lock is free before the sweep has left: the others must not repeat."""
    other = Controllers(study.folder)
    trial, alive = study.begin(other.name)
    finish(trial)
    assert study.recover() == []
    alive.release()
    (record,) = study.recover()
    assert (record.uid, record.number) == (UID, 0)
    assert study.recover() == []
    other.leave()


def test_a_trial_that_was_journaled_meanwhile_is_not_taken_again(study: Study) -> None:
    """Its sweep journals first and lets go then; this one has read the journal before."""
    other = Controllers(study.folder)
    trial, alive = study.begin(other.name)
    finish(trial)
    theirs = Journal.open(study.folder)
    theirs.append(
        Record(uid=UID, study="study", result=ok(CFG, 7.0), fingerprint_hash="0123456789ab")
    )
    alive.release()
    assert study.recover() == []
    assert (trial / "trial.json").exists()
    other.leave()


@pytest.mark.parametrize("moment", ["before trial.json", "in config.json", "before unlinking"])
def test_nothing_lies_about_after_a_kill(study: Study, moment: str) -> None:
    trial, alive = study.begin("a-dead-one")
    claim = study.claims.take(CFG.hash(), fingerprint_hash(SEEN), "s")
    assert claim is not None
    alive.release()
    claim.release()
    if moment == "before trial.json":
        (trial / "trial.json").rename(trial / ".trial.json.1.tmp")
    elif moment == "in config.json":
        (trial / ".config.json.1.tmp").write_text("{")
    else:
        finish(trial)
    kept = study.recover()
    assert len(kept) == (moment == "before unlinking")
    assert {path.name for path in trial.iterdir()} <= {"trial.json", "config.json", "result.json"}
    assert not list((study.folder / "claims").iterdir())


def test_what_another_sweep_is_about_to_begin_is_left_alone(study: Study) -> None:
    other = Controllers(study.folder)
    trial = study.folder / "trials" / UID[:12]
    trial.mkdir(parents=True)
    alive = locks.take(trial / "alive.lock")
    claim = study.claims.take(CFG.hash(), fingerprint_hash(SEEN), "s")
    assert alive is not None
    assert claim is not None
    study.recover()
    assert (trial / "alive.lock").exists()
    assert locks.is_held(claim.path)
    other.leave()


def test_what_a_dead_sweep_had_finished_counts_before_the_next_point_is_chosen(
    tmp_path: Path,
) -> None:
    ledger = Ledger(Store.open(tmp_path), REQUEST, Display())
    study = Study(ledger.study_dir)
    running = study.claims.take("0123456789ab", fingerprint_hash(SEEN), "s")
    claim = study.claims.take(CFG.hash(), fingerprint_hash(SEEN), "s")
    trial, alive = study.begin("a-dead-one")
    assert claim is not None
    assert running is not None
    assert ledger.live("s") == {"0123456789ab", CFG.hash()}
    finish(trial)
    alive.release()
    claim.release()
    assert ledger.live("another space") == set()
    assert len(ledger.journal) == 0
    assert ledger.live("s") == {"0123456789ab"}
    assert [record.uid for record in ledger.journal.records()] == [UID]
    ledger.close()


def test_nobody_looks_at_a_sweep_while_it_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making the file and locking it, a look by others would take the lock away."""
    Controllers(tmp_path)
    taken = locks.take

    def take(path: Path, *note: str) -> Held | None:
        settle = tmp_path / "controllers" / "settle.lock"
        if path != settle:
            with pytest.raises(Timeout):
                FileLock(settle).acquire(timeout=0)
        return taken(path, *note)

    monkeypatch.setattr(locks, "take", take)
    assert Controllers(tmp_path).name
