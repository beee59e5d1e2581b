"""The command line in this process: what is refused, and how presets compose."""

import pytest
from command_samples import PRESETS, CommandLine


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["attention=aitr"], ["attention=aitr", "aiter, cudnn, eager", "mean attention=aiter"]),
        (["attentoin=sdpa"], ["attentoin", "precision, simplify", "mean attention?"]),
        (["measure.warmpu=3"], ["measure.warmpu", "warmup, iterations", "measure.warmup?"]),
        (["attention.foo=1"], ["attention.foo", "vision, prefill, denoise"]),
        (["+foo=1"], ["'foo'", "known are"]),
        (["hydra.nope=1"], ["hydra.nope", "no effect"]),
        (["compile.inductor.multi_kernel=2"], ["mean compile.inductor.triton.multi_kernel?"]),
        (["environment.variables.FOO=1"], ["+environment.variables.FOO=VALUE"]),
        (["measure.warmup=0"], ["measure.warmup=0", "at least 3"]),
        (["attention=aiter,sdpa"], ["attention=aiter,sdpa", "-m"]),
        (["measure.warmup=range(3,5)"], ["-m"]),
        (["attention="], ["'attention='", "VALUE"]),
        (["attention=5"], ["attention=5", "option"]),
        (["attention=null"], ["attention=null", "option"]),
        (["attention"], ["'attention'", "group=option"]),
        (["+attention=sdpa"], ["attention is chosen twice"]),
        (["study=../x"], ["../x", "study name"]),
        (["study=a/b"], ["a/b", "study name"]),
        (["weights=checkpoint"], ["weights.path", "weights.path=VALUE"]),
        (["weights=checkpoint", "weights.path=/nonexistent"], ["/nonexistent", "safetensors"]),
        (["platform=cuda"], ["platform=cuda", "no CUDA GPU", "platform=cpu"]),
        (["devices=[7]", "platform=cpu"], ["devices=[7]", "GPU", "cpu_slots"]),
        (["devices=[true]"], ["devices"]),
        (["platform=rocm"], ["platform=rocm", "no ROCM GPU"]),
        (["workload.seed=${nope}"], ["workload.seed", "nope"]),
        (["hydra/sweeper=basic"], ["hydra/sweeper", "Leave it out"]),
        (["--experimental-rerun", "x.pkl"], ["pickle"]),
        (["--config-path", "x"], ["--config-dir"]),
        (["-m", "--cfg", "job"], ["--multirun and --cfg"]),
        (["--config-dir", "/nonexistent"], ["/nonexistent"]),
        (["--config-name", "nope"], ["nope", "--config-name"]),
        (["simplify=all", "-m", "attention=sdpa,sdqa"], ["attention=sdqa", "mean attention=sdpa"]),
        (["-m", "attentoin=sdpa,eager"], ["attentoin", "mean attention?"]),
        (["-m", "attention=glob(z*)"], ["aiter, cudnn, eager"]),
        (["-m", "sampler=grid", "guard.cap=interval(0.01,0.1)"], ["sampler=grid", "tpe"]),
        (["-m", "workload.batch_size=interval(1,4)"], ["workload.batch_size", "integer"]),
        (["-m", "platform=cpu,cuda"], ["platform=cuda"]),
        (["-m", "hydra.verbose=true,false"], ["hydra.verbose", "no effect"]),
        (["space=nope"], ["space=nope", "attention, compile, full, ladder, launch, none"]),
        (["-m", "space=full,ladder"], ["space", "cannot itself be swept"]),
        (["space=attention", "graph=manual"], ["no combination", "cpu", "--dry-run"]),
        (["space=attention", "attention=sdpq"], ["attention=sdpq", "mean attention=sdpa"]),
        (["objective.allow_lossy=maybe"], ["objective.allow_lossy=maybe"]),
        (["objective.alow_lossy=true"], ["objective"]),
        (["--limit", "3", "attention=sdpa"], ["--limit", "--dry-run"]),
        (["--dry-run", "--limit", "0"], ["dry_run=0"]),
        (["preset=nope"], ["preset=nope", "body", "good"]),
        (["preset=unknown_key"], ["preset=unknown_key", "'warp'"]),
        (["preset=unknown_field"], ["attention.speed", "vision, prefill, denoise"]),
        (["preset=unknown_knob"], ["unknown_knob", "warp", "precision, simplify"]),
        (["preset=unknown_option"], ["attention=fast", "aiter, cudnn, eager"]),
        (["preset=broken"], ["broken.yaml", "not YAML"]),
        (["preset=no_head"], ["no_head.yaml", "@package _global_"]),
        (["preset=number"], ["number.yaml", "compile: 16", 'quotes: "16"']),
        (["preset=twice"], ["twice.yaml line 2", "vision is there twice"]),
        (["preset=store"], ["store.yaml", "'store'", "knobs and provenance and nothing else"]),
        (["preset=guard"], ["guard.yaml", "'guard'", "knobs and provenance and nothing else"]),
        (["preset=workload"], ["workload.yaml", "'workload'", "nothing else"]),
        (["preset=deep"], ["deep.yaml line 2", "levels deep"]),
        (["preset=itself"], ["itself.yaml line 2", "alias"]),
        (["preset=many"], ["many.yaml", "65,536 bytes"]),
        (["preset=body", "attention=eager"], ["attention=eager", "body.yaml", "attention.KEY"]),
        (["preset=above", "attention=eager"], ["attention=eager", "body.yaml"]),
        (["-m", "preset=body", "attention=eager,sdpa"], ["attention=eager", "body.yaml"]),
    ],
    ids=" ".join,
)
def test_bad_input(command, words, expected, capfd):
    message = command.error(*words)
    assert [word for word in expected if word not in message] == [], message
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in command.folder.iterdir()) == ["conf"]


def test_a_store_that_cannot_be_written(command):
    (command.folder / "file").write_text("")
    assert "store=file/store" in command.error("store=file/store")
    assert "store=file" in command.error("-m", "attention=sdpa", "store=file")


STAGES = ("vision", "prefill", "denoise")


def composed(command: CommandLine, capsys: pytest.CaptureFixture, *words: str) -> str:
    command(*words, "--cfg", "job", "--package", "attention")
    shown = capsys.readouterr().out.splitlines()
    return "\n".join(line for line in shown if line.partition(":")[0] in STAGES)


def test_a_preset_of_the_working_folder_composes_and_the_command_line_wins(command, capsys):
    sdpa, eager = (f"vision: {w}\nprefill: {w}\ndenoise: {w}" for w in ("sdpa", "eager"))
    assert composed(command, capsys, "preset=good") == sdpa
    assert composed(command, capsys, "preset=good", "attention=eager") == eager
    mixed = composed(command, capsys, "preset=body", "attention.prefill=aiter")
    assert mixed == "vision: sdpa\nprefill: aiter\ndenoise: sdpa"
    folder = command.folder / "elsewhere" / "preset"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(PRESETS["good"])
    away = ["--config-dir", str(folder.parent), "preset=mine"]
    assert composed(command, capsys, *away) == sdpa


def test_a_space_of_the_working_folder_and_no_need_of_m(command, capsys):
    (command.folder / "conf" / "space").mkdir()
    (command.folder / "conf" / "space" / "mine.yaml").write_text(
        "sweep: ['attention=eager,sdpa', 'simplify=none,all']\n"
    )
    assert command("--dry-run", "space=mine", "simplify=none") == 0
    shown = capsys.readouterr().out
    assert "2 as written, 2 sensible, 2 different" in shown
    assert "attention=eager" in shown
    (command.folder / "conf" / "space" / "odd.yaml").write_text("swep: ['attention=eager,sdpa']\n")
    assert "swep" in command.error("space=odd")
    (command.folder / "conf" / "space" / "bad.yaml").write_text("sweep: ['attention=eager,']\n")
    assert "attention=eager," in command.error("space=bad")


def test_an_option_that_is_two_different_files_is_refused(command):
    (command.folder / "conf" / "attention").mkdir()
    (command.folder / "conf" / "attention" / "sdpa.yaml").write_text("vision: aiter\n")
    assert "two different files" in command.error("attention=sdpa")


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("devices=[0,1]", "gpus:\n- 0\n- 1\n"),
        ("devices=all", "gpus: all\n"),
        ("devices.cpu_slots=2", "cpu_slots: 2\n"),
    ],
)
def test_gpus_are_named_in_a_list(command, capsys, word, wanted):
    command(word, "--cfg", "job", "--package", "devices")
    assert wanted in capsys.readouterr().out
