import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from track_samples import config, failed, ok, record, refused, wrong

from openpi_opt.errors import UserError
from openpi_opt.result import Latency
from openpi_opt.track.journal import Journal
from openpi_opt.track.store import unusable

HERE = Path(__file__).parent
SAMPLES = HERE.parent / "samples"


def writer(study: Path, body: str) -> subprocess.Popen[str]:
    """A real process with a journal open in `j`; it prints what it did."""
    code = (
        f"import sys; sys.path.insert(0, {str(SAMPLES)!r})\n"
        "from pathlib import Path\n"
        "from track_samples import *\n"
        "from openpi_opt.track.journal import Journal\n"
        f"j = Journal.open(Path({str(study)!r}))\n" + body
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE.parents[1],
    )


def test_round_trip_of_every_outcome(tmp_path):
    journal = Journal.open(tmp_path / "s", command=["sweep", "-m"])
    given = [record(result) for result in (ok(), wrong(), refused(), failed())]
    written = [journal.append(item) for item in given]
    assert [item.number for item in written] == [0, 1, 2, 3]
    for reopened in (Journal.open(tmp_path / "s"), Journal.read(tmp_path / "s")):
        assert reopened.records() == written == journal.records()
        assert reopened.notes == []
        assert reopened.header is not None
        assert reopened.header.command == ["sweep", "-m"]
        assert reopened.header.name == "s"


def test_a_uid_is_written_once(tmp_path):
    journal = Journal.open(tmp_path)
    item = record()
    assert journal.append(item) == journal.append(item) == Journal.open(tmp_path).append(item)
    assert len(Journal.read(tmp_path).records()) == 1


def test_find_knows_hashes_and_leaves_out_confirmations(tmp_path):
    journal = Journal.open(tmp_path)
    cfg = config(attention={"vision": "sdpa"})
    first = journal.append(record(ok(10, cfg)))
    journal.append(record(ok(11, cfg), role="confirm"))
    hashes = first.result.config_hash, first.fingerprint_hash
    assert journal.find(*hashes) == first
    newer = journal.append(record(ok(12, cfg), role="baseline"))
    assert journal.find(*hashes) == Journal.open(tmp_path).find(*hashes) == newer
    assert journal.find(hashes[0], "other") is None
    assert journal.by_uid(first.uid) == first


def test_one_journal_sees_what_another_appends(tmp_path):
    one, two = Journal.open(tmp_path), Journal.open(tmp_path)
    one.append(record())
    assert two.append(record()).number == 1
    one.refresh()
    assert one.records() == two.records()


def test_numbers_in_text_cannot_break_lines(tmp_path):
    reason = "line\nbreak \r\n \u2028 \0 and \x85"
    Journal.open(tmp_path).append(record(failed(reason)))
    (back,) = Journal.open(tmp_path).records()
    assert back.result.reason == reason  # type: ignore[union-attr]


def test_a_record_that_would_not_come_back_is_not_written(tmp_path):
    journal = Journal.open(tmp_path)
    journal.append(record())
    good = ok()
    bad = good.model_copy(update={"throughput_hz": float("nan")})
    with pytest.raises(ValidationError):
        journal.append(record().model_copy(update={"result": bad}))
    assert len(Journal.open(tmp_path).records()) == 1


@pytest.fixture(scope="module")
def three_lines(tmp_path_factory):
    journal = Journal.open(tmp_path_factory.mktemp("three"))
    for result in (ok(), refused("ä ü"), failed()):
        journal.append(record(result))
    return journal.path.read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_cut_at_any_byte(tmp_path_factory, three_lines, data):
    ends = [i + 1 for i, byte in enumerate(three_lines) if byte == 10]
    near = [min(max(end + d, 0), len(three_lines)) for end in (0, *ends) for d in (-2, -1, 0, 1)]
    cut = data.draw(st.integers(0, len(three_lines)) | st.sampled_from(near))
    folder = tmp_path_factory.mktemp("cut")
    (folder / "journal.jsonl").write_bytes(three_lines[:cut])
    # A line that lacks nothing but its newline is whole.
    whole = sum(cut >= end - 1 for end in ends)
    torn = b"" if cut in (0, *(end - 1 for end in ends)) else three_lines[:cut].split(b"\n")[-1]

    assert len(Journal.read(folder).records()) == whole
    assert (folder / "journal.jsonl").read_bytes() == three_lines[:cut]
    journal = Journal.open(folder)
    assert len(journal.records()) == whole
    assert bool(journal.notes) == bool(torn)
    assert [path.read_bytes() for path in folder.glob("journal.torn-*")] == [torn] * bool(torn)
    assert journal.append(record()).number == whole
    assert len(Journal.open(folder).records()) == whole + 1


def test_torn_ends_are_kept_apart(tmp_path):
    for text in ("one", "two", "three"):
        journal = Journal.open(tmp_path)
        with journal.path.open("a") as file:
            file.write(text)
    Journal.open(tmp_path)
    kept = {path.read_text() for path in tmp_path.glob("journal.torn-*")}
    assert kept == {"one", "two", "three"}


@pytest.mark.parametrize("damage", [b"garbage", b"", b"{}", b"\x00\x00", b"\xff\xfe", b"[1]"])
def test_a_damaged_line_inside_names_file_and_line(tmp_path, three_lines, damage):
    lines = three_lines.split(b"\n")
    lines[1] = damage
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"\n".join(lines))
    for make in (Journal.open, Journal.read):
        with pytest.raises(UserError, match=r"journal\.jsonl line 2 is damaged") as caught:
            make(tmp_path)
        assert len(str(caught.value).splitlines()) <= 3
    assert path.read_bytes() == b"\n".join(lines)


@pytest.mark.parametrize("where", ["record", "result", "header"])
def test_newer_format(tmp_path, where):
    journal = Journal.open(tmp_path)
    journal.append(record())
    path = tmp_path / "study.json" if where == "header" else journal.path
    document = json.loads(path.read_text())
    part = document["result"] if where == "result" else document
    part["schema_version"] += 1
    path.write_text(json.dumps(document) + "\n")
    with pytest.raises(UserError, match="newer openpi_opt"):
        Journal.open(tmp_path)


def test_killed_writers_lose_nothing_that_was_told(tmp_path):
    """`kill -9` at random moments of an append loop."""
    study, told = tmp_path / "s", set()
    for seed in range(4):
        process = writer(study, "while True: print(j.append(record()).uid, flush=True)\n")
        assert process.stdout is not None
        told.add(process.stdout.readline().strip())
        time.sleep(random.Random(seed).uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        told |= {line for line in out.split("\n")[:-1] if len(line) == 32}
    records = Journal.open(study).records()
    assert told <= {item.uid for item in records}
    assert [item.number for item in records] == list(range(len(records)))
    assert len({item.uid for item in records}) == len(records)


def test_two_processes_lose_and_duplicate_nothing(tmp_path):
    body = "for _ in range(60): print(j.append(record()).uid)\n"
    processes = [writer(tmp_path / "s", body) for _ in range(2)]
    outs = [process.communicate(timeout=50) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    told = [uid for out, _ in outs for uid in out.split()]
    records = Journal.read(tmp_path / "s").records()
    assert sorted(told) == sorted(item.uid for item in records)
    assert [item.number for item in records] == list(range(120))


def test_full_disk_keeps_what_was_written(tmp_path):
    """A file size limit in the middle of a line: a short write, then an error."""
    study = tmp_path / "s"
    Journal.open(study).append(record())
    size = (study / "journal.jsonl").stat().st_size
    body = (
        "import resource\n"
        "from openpi_opt.errors import UserError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 500}, {size + 500}))\n"
        "try: j.append(record())\n"
        "except UserError as error: print(error)\n"
    )
    out, err = writer(study, body).communicate(timeout=50)
    assert "File too large" in out, (out, err)
    assert (study / "journal.jsonl").stat().st_size == size
    journal = Journal.open(study)
    assert journal.notes == []
    assert journal.append(record()).number == 1


def test_reading_changes_nothing(tmp_path, three_lines):
    (tmp_path / "journal.jsonl").write_bytes(three_lines + b"torn")
    journal = Journal.read(tmp_path)
    assert len(journal.records()) == 3
    assert "incomplete last line" in journal.notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_unwritable_folder():
    with pytest.raises(UserError, match="recorded before is kept"):
        Journal.open(Path("/proc/openpi-opt"))


def test_a_study_that_is_deleted_meanwhile_is_not_said_to_be_kept(tmp_path):
    journal = Journal.open(tmp_path / "s")
    journal.append(record())
    (tmp_path / "s" / "journal.jsonl").unlink()
    with pytest.raises(UserError, match=r"deleted, moved or cut short meanwhile: 0 of \d+ bytes"):
        journal.append(record())
    assert not (tmp_path / "s" / "journal.jsonl").exists()
    shutil.rmtree(tmp_path / "s")
    trial = tmp_path / "s" / "trials" / "x"
    told = str(unusable("run a trial", trial, FileNotFoundError(2, "no"), "Free space"))
    assert "deleted or moved meanwhile" in told
    assert "is kept" not in told


def test_header_is_written_once(tmp_path):
    first = Journal.open(tmp_path, command=["a"]).header
    assert Journal.open(tmp_path, command=["b"]).header == first
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UserError, match=r"study\.json is damaged"):
        Journal.open(tmp_path)


def written(folder: Path, count: int = 4) -> list[bytes]:
    journal = Journal.open(folder)
    for _ in range(count):
        journal.append(record())
    return (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)


def test_a_line_that_was_edited_is_refused(tmp_path):
    lines = written(tmp_path)
    assert lines[1].count(b'"mean_ms":10.0') == 1
    lines[1] = lines[1].replace(b'"mean_ms":10.0', b'"mean_ms":9.0')
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="line 2 was changed since it was written"):
        Journal.read(tmp_path)


def test_lines_that_are_doubled_moved_or_missing_are_noted(tmp_path):
    a, b, c, d = written(tmp_path)
    for kept, says in (
        ([a, b, b, c, d], ["line 3 repeats record 1: left out"]),
        ([a, c, d], ["line 2 has number 2 where 1 should follow: lines were moved or removed"]),
        ([a, c, b, d], ["line 2 has number 2 where 1", "line 3 has number 1 where 3", "line 4"]),
    ):
        (tmp_path / "journal.jsonl").write_bytes(b"".join(kept))
        journal = Journal.read(tmp_path)
        assert len(journal) == len(set(kept))
        assert len(journal.notes) == len(says)
        assert all(text in note for text, note in zip(says, journal.notes, strict=True))


def test_lines_without_a_checksum_are_read(tmp_path):
    """As older versions wrote them."""
    lines = written(tmp_path)
    (tmp_path / "journal.jsonl").write_bytes(
        b"".join(re.sub(rb',"check":"[0-9a-f]{8}"\}$', b"}", line) for line in lines)
    )
    journal = Journal.open(tmp_path)
    assert (len(journal), journal.notes) == (4, [])
    journal.append(record())
    assert Journal.read(tmp_path).records()[-1].check


def test_a_brief_record_lacks_samples_and_the_kernel_table_alone(tmp_path):
    journal = Journal.open(tmp_path)
    cfg = config(blas={"tunableop": {"file": '},"config_hash":'}})
    for result in (ok(cfg=cfg), ok(11), wrong(), refused("]}"), failed('"files":{},"started_at":')):
        journal.append(record(result, params={"a": '"config":{'}))
    whole, brief = (Journal.read(tmp_path, brief=short).records() for short in (False, True))
    assert whole[0].result.kernel_table
    assert not brief[0].result.kernel_table
    assert brief[0].result.config is not brief[1].result.config
    assert brief[0].result.fingerprint is brief[1].result.fingerprint
    gone = {"kernel_table": True, "latency": {n for n in Latency.model_fields if "samples" in n}}
    for one, other in zip(whole, brief, strict=True):
        assert dict(other.result.config) == one.result.config
        told = [item.result.model_dump(exclude={"config": True, **gone}) for item in (one, other)]
        assert told[0] == told[1]
        assert one.model_copy(update={"result": None}) == other.model_copy(update={"result": None})


def test_a_changed_line_is_noticed_in_brief_too(tmp_path):
    Journal.open(tmp_path).append(record())
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"name":"aten::mm"', b'"name":"aten::bm"'))
    with pytest.raises(UserError, match="checksum"):
        Journal.read(tmp_path, brief=True)
