import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from typing import Any

import pytest
from track_samples import FINGERPRINT, H100, config, failed, ok, record, refused, roofline, wrong

from openpi_opt.config import Config
from openpi_opt.criteria import Criteria
from openpi_opt.track.fingerprint import fingerprint
from openpi_opt.track.journal import Record
from openpi_opt.track.report import groups, rows
from openpi_opt.track.table import print_groups


def text(records: list[Record]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_groups(groups(records))
    return out.getvalue()


def numbered(*records: Record) -> list[Record]:
    return [item.model_copy(update={"number": i}) for i, item in enumerate(records)]


def sdpa(**more: Any) -> Config:
    return config(attention={"vision": "sdpa", "prefill": "sdpa", "denoise": "sdpa"}, **more)


def test_table_of_a_small_study():
    aiter = config(attention=dict.fromkeys(("vision", "prefill", "denoise"), "aiter"))
    records = numbered(
        record(ok(20.0), role="baseline"),
        record(ok(10.0, sdpa()), params={"attention": "sdpa"}),
        record(refused("attention=aiter needs a GPU [see docs]", aiter), params={"x": "y"}),
    )
    lines = [line.strip() for line in text(records).splitlines()]
    assert lines[0] == "pi0_mini on cpu (AMD EPYC), workload seed_b1"
    cells = [re.split("  +", line) for line in lines]
    assert cells[1] == ["vs."]
    assert cells[2] == ["#", "attention", "outcome", "mean ± std ms", "operators", "baseline"]
    assert cells[4] == ["0", "eager", "ok baseline", "20.000 ± 0.500", "321", "1.00x"]
    assert cells[5] == ["* 1", "sdpa", "ok", "10.000 ± 0.500", "321", "2.00x"]
    assert cells[6] == ["2", "aiter", "unavailable"]
    assert lines[7] == "2 unavailable: attention=aiter needs a GPU [see docs]"
    assert lines[8].startswith("flagged gpu_clock: 0 (")
    assert "promote confirms it" in lines[9]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_loses_nothing(width):
    """Real pseudo-terminals: text folds, numbers never end in dots, reasons stay whole."""
    why = "attention=aiter needs an AMD GPU with ROCm, or an NVIDIA GPU for its Triton kernels"
    mixed = config(attention={"vision": "sdpa"}, compile={"mode": "default"})
    records = numbered(
        record(ok(1234.5), role="baseline"),
        record(ok(10.0, mixed, noisy=True)),
        record(refused(why)),
        record(refused(why)),
    )
    code = (
        "import sys; from openpi_opt.track.journal import Record\n"
        "from openpi_opt.track.report import groups\n"
        "from openpi_opt.track.table import print_groups\n"
        "print_groups(groups([Record.model_validate_json(line) for line in open(sys.argv[1])]))"
    )
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("\n".join(item.model_dump_json() for item in records))
        file.flush()
        shown = in_terminal([sys.executable, "-c", code, file.name], width)
    assert "…" not in shown
    for part in ("1234.500 ± 0.500", "~ 10.000 ± 0.500", "123.45x", "baseline", "unavailable"):
        assert part in shown
    assert "".join(why.split()) in "".join(shown.split())
    assert "2, 3 unavailable" in shown
    assert "vision=s" in shown, "no column of a knob vanishes"
    if width == 80:
        assert max(map(len, shown.splitlines())) <= 80


def in_terminal(command: list[str], width: int) -> str:
    """Output of a command on a pseudo-terminal, without colours."""
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    plain = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(command, stdout=terminal, env=plain)
    os.close(terminal)
    chunks = []
    with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
        while chunk := os.read(control, 4096):
            chunks.append(chunk)
    os.close(control)
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", b"".join(chunks).decode())


def test_best_is_the_fastest_right_one():
    records = numbered(
        record(wrong()), record(ok(9)), record(ok(8)), record(ok(7), role="confirm"), record(ok(8))
    )
    assert [row.best for row in rows(records)] == [False, False, True, False, False]
    assert not any(row.best for row in rows(numbered(record(wrong()), record(failed()))))


def test_contexts_are_compared_apart():
    large = {"workload": {"name": "seed_b1", "batch_size": 8}}
    records = numbered(
        record(ok(10), role="baseline"),
        record(ok(100, config(**large))),
        record(ok(5)),
        record(ok(50, config(**large)), role="baseline"),
    )
    found = {row.record.number: row for row in rows(records)}
    assert [group.title.split(", ", 1)[1] for group in groups(records)] == [
        "workload seed_b1",
        "workload seed_b1, batch 8",
    ]
    assert [found[i].vs_baseline for i in range(4)] == [1.0, 0.5, 2.0, 1.0]
    assert [found[i].best for i in range(4)] == [False, False, True, True]
    assert text(records).count("mean ± std ms") == 2


def test_contexts_of_one_title_are_told_apart():
    records = numbered(record(ok()), record(ok(cfg=config(weights={"seed": 1}))))
    titles = [group.title for group in groups(records)]
    assert len(set(titles)) == 2
    assert all(records[i].result.context_hash in titles[i] for i in range(2))


def test_another_fingerprint_is_marked_and_not_compared():
    old = {**FINGERPRINT, "triton": "1.0"}
    records = numbered(
        record(ok(20.0, fp=old), role="baseline"),
        record(ok(1.0, fp=old)),
        record(ok(10.0)),
    )
    first, second, third = rows(records)
    assert (first.stale, second.stale, third.stale) == (True, True, False)
    assert (first.best, second.best, third.best) == (False, False, True)
    assert second.vs_baseline == 20.0  # both measured on the old one
    assert third.vs_baseline == 1.0  # itself: plain, and not the old baseline's 2x
    shown = text(records)
    assert "1†" in shown
    assert "triton: 1.0 ->" in shown
    assert f"† measured on {records[0].fingerprint_hash}" in shown


def test_columns_are_what_varies():
    same = numbered(record(ok(), params={"seed": "1"}), record(ok(), params={"seed": "1"}))
    assert list(rows(same)[0].differs) == []  # the baseline alone
    other = {**record(ok()).labels, "attention": "sdpa"}
    alone = [record(ok()).model_copy(update={"labels": other})]
    assert rows(numbered(*alone))[0].differs == {"attention": "sdpa"}
    swept = numbered(record(ok(), params={"limits.load": "1"}), record(ok(), params={}))
    assert list(rows(swept)[0].differs) == []
    swept = [*swept, record(ok(), params={"limits.load": "2"}, number=2)]
    assert [row.differs for row in rows(swept)] == [
        {"limits.load": "1"},
        {"limits.load": ""},
        {"limits.load": "2"},
    ]
    both = numbered(
        record(ok(), params={"attention.vision": "eager"}),
        record(ok(1, config(attention={"vision": "sdpa"})), params={"attention.vision": "sdpa"}),
    )
    assert [row.differs["attention"] for row in rows(both)] == [
        "eager",
        "vision=sdpa prefill=eager denoise=eager",
    ]
    assert list(rows(both)[0].differs) == ["attention"]


def test_many_keys_are_one_column_of_what_differs_within_120_columns(capsys):
    def of(number: int) -> Config:
        keys = ("last_layer", "fold_norms", "time_mlp", "rope_tables", "kv_buffer")
        return config(
            simplify={key: bool(number >> place & 1) for place, key in enumerate(keys)},
            fusion={"qkv": True, "gate_up": number > 3, "vision_qkv": number > 5},
            attention={"vision": "sdpa", "prefill": ["eager", "sdpa"][number % 2]},
            vision={"cameras": ["batched", "separate"][number % 2]},
            compile={"mode": "default", "inductor": {"freezing": number > 2}},
        )

    records = numbered(
        record(ok(200.0), role="baseline"),
        *(record(ok(20.0 - n, of(n)), params={"step": str(n)}) for n in range(8)),
    )
    print_groups(groups(records))
    lines = capsys.readouterr().out.splitlines()
    table_lines = lines[: next(n for n, line in enumerate(lines) if line.startswith("flagged"))]
    assert max(map(len, table_lines)) <= 120
    text = " ".join(" ".join(line.split()) for line in table_lines)
    assert "what differs" in text
    assert "simplify=last_layer+fold_norms" in text
    assert "elementwise" not in text  # the same in all


def test_reasons_are_one_short_line():
    shown = text(numbered(record(failed("\x1b[31mCUDA error\x1b[0m\n\nsecond\tline " + "x" * 500))))
    assert "CUDA error second line xxx" in shown
    assert "\x1b" not in shown
    assert all(len(row.reason) <= 300 for row in rows([record(failed("y" * 500))]))


def test_no_flagged_trial_is_left_out_of_a_long_line():
    shown = text(numbered(*(record(ok()) for _ in range(40))))
    (line,) = (line for line in shown.splitlines() if line.startswith("flagged gpu_clock"))
    assert "0 (1200 of 1980 MHz before), 1 (1200" in line
    assert line.endswith(" 37, 38, 39")
    assert len(line) < 500


GPU = ok(cfg=config(platform={"device": "cuda"}), kind="device_kernels", fp=fingerprint(H100))
SAID = "1200 of 1980 MHz before"


@pytest.mark.parametrize(
    ("results", "shows"),
    [
        ([GPU], ["pi0_mini on cuda (NVIDIA H100)", "kernels"]),
        ([ok(), ok(kind="device_kernels")], ["321 operators"]),
        ([ok(), ok()], [f"flagged gpu_clock: 0 ({SAID}), 1 ({SAID})"]),
        ([ok(noisy=True)], ["~ 10.000", "~ noisy"]),
    ],
)
def test_a_table_says(results, shows):
    shown = text(numbered(*map(record, results)))
    assert all(words in shown for words in shows)
    assert ("operators" in shown) == (results != [GPU])


def test_nothing_to_show():
    assert rows([]) == []
    assert text([]).strip() == ""


def test_a_lossy_trial_is_marked_and_never_best():
    fp8 = config(blas={"backend": "fp8"})
    records = numbered(record(ok(10.0)), record(ok(1.0, cfg=fp8)))
    assert [row.best for row in rows(records)] == [True, False]
    allowed = rows(records, Criteria(allow_lossy=True))
    assert [row.best for row in allowed] == [False, True]
    shown = text(records)
    assert "ok lossy" in shown
    assert "wider limit" in shown


def test_the_share_of_the_limit_has_a_column_once_it_is_known():
    known = ok(10.0).model_copy(update={"roofline": roofline()})
    sheet = ok(10.0, sdpa()).model_copy(update={"roofline": roofline("datasheet")})
    records = numbered(record(ok(20.0), role="baseline"), record(known), record(sheet))
    lines = [line.rstrip() for line in text(records).splitlines()]
    assert [line.endswith("limit") for line in lines[:3]] == [False, False, True]
    assert [re.split("  +", line)[-1] for line in lines[4:7]] == ["1.00x", "40.0%", "40.0%‡"]
    assert any(line.startswith("‡ of the datasheet's limit") for line in lines)
    assert "limit" not in text(records[:1])
