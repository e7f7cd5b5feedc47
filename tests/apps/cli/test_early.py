"""What is wrong on the command line is said before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from dinov2_attn.apps.cli.main import main
from tests.support import subprocesses

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights

# The program, which fails if torch was imported.
WITHOUT_TORCH = """
import sys
from dinov2_attn.apps.cli.main import main
try:
    status = main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
sys.exit(status)
"""


def early(folder, *arguments):
    return subprocesses.python("-c", WITHOUT_TORCH, *arguments, cwd=folder)


@pytest.fixture
def folder(tmp_path, image):
    (tmp_path / "photo.png").write_bytes(image.read_bytes())
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "gone.png").symlink_to("nosuch")
    return tmp_path


OUT = ["-o", "out"]
PAGE = ["-o", "page.html"]
PDF = ["-o", "fig.pdf"]

WRONG = [
    (["heatmap", "nosuch.png", *OUT], 1, "Found nosuch.png, which cannot be read"),
    (["heatmap", "phto.png", *OUT], 1, "Did you mean photo.png?"),
    (["heatmap", "photos", *OUT], 1, "`dinov2-attn extract` takes folders"),
    (["heatmap", "gone.png", *OUT], 1, "Check the path.\n"),
    (["explore", "clip.mp4", *PAGE], 2, "Found clip.mp4, which is called like a video"),
    (["figure", "clip.mp4", *PDF], 2, "`dinov2-attn heatmap` makes a film"),
    (["heatmap", "photo.png", "-o", "file"], 2, "Expected a folder that can be written at file"),
    (["heatmap", "photo.png", "-o", "file/out"], 2, "Not a directory"),
    (["heatmap", "photo.png", *OUT, "--weights", "no.pth"], 2, "a checkpoint at no.pth"),
    (["heatmap", "photo.png", *OUT, "--repo", "photos"], 2, "Expected a checkout of upstream"),
    (
        ["heatmap", "photo.png", *OUT, "--model", "dinov3_vits16", "--repo", "photos"],
        2,
        "Expected a checkout of DINOv3",
    ),
    (["heatmap", "photo.png", *OUT, "--queries", "register:0"], 2, "a register from 1 on"),
    (["heatmap", "photo.png", *OUT, "--queries", "reg1"], 2, "found 'reg1'"),
    (["heatmap", "photo.png", *OUT, "--queries", "register:1"], 2, "a model with registers"),
    (
        ["heatmap", "photo.png", *OUT, "--registers", "--queries", "register:5"],
        2,
        "a register from 1 to 4",
    ),
    (["heatmap", "photo.png", *OUT, "--layers", "12"], 2, "Expected blocks between -12 and 11"),
    (["heatmap", "photo.png", *OUT, "--layers", "x"], 2, "expected blocks with commas"),
    (["heatmap", "photo.png", *OUT, "--num-heads", "3"], 2, "together with --weights"),
    (["explore", "nosuch.png", *PAGE], 2, "Found nosuch.png"),
    (["explore", "photo.png", "-o", "page"], 2, "ends in .html; found 'page'. Try page.html."),
    (["explore", "photo.png", "photo.png", *PAGE], 2, "Found photo.png, photo.png"),
    (["explore", "photo.png", *PAGE, "--layers=-13"], 2, "Expected blocks between -12 and 11"),
    (["figure", "photo.png", "nosuch.png", *PDF], 2, "Found nosuch.png"),
    (["figure", "photo.png", *PDF, "--query", "register:1"], 2, "a model with registers"),
    (["figure", "photo.png", *PDF, "--query", "register:0"], 2, "a register from 1 on"),
    (["figure", "photo.png", *PDF, "--layer", "12"], 2, "Expected blocks between -12 and 11"),
    (["extract", "nosuch", *OUT], 2, "Found nosuch, which cannot be read"),
    (["extract", "photos", "-o", "file"], 2, "a folder that can be written at file"),
    (["demo", "-o", "file"], 2, "a folder that can be written at file"),
]


def test_it_takes_less_than_a_second(folder):
    """Importing torch alone takes longer, so the best of three runs is enough."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        assert early(folder, "heatmap", "nosuch.png", *OUT).returncode == 1
        times.append(time.perf_counter() - begun)
    assert min(times) < 1


@pytest.mark.parametrize(
    ("arguments", "status", "said"), WRONG, ids=[" ".join(one[0]) for one in WRONG]
)
def test_it_needs_no_torch(folder, arguments, status, said):
    before = sorted(folder.rglob("*"))
    result = early(folder, *arguments)
    assert result.returncode == status, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.usefixtures("imported")
def test_an_image_that_is_not_there_leaves_the_others(folder, caplog, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ["nosuch.png", "photo.png", "photos", "-o", "out", "--random-weights"]
    assert main(["heatmap", *arguments]) == 1
    assert caplog.text.count("which cannot be read") == 2
    assert os.listdir("out") == ["photo"]


# Words that the program does not know


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hetmap"], "Did you mean heatmap?"),
        (["photo.png"], "To draw it: dinov2-attn heatmap photo.png -o out"),
        (["zzz"], "Try demo."),
        (["heatmap", "photo.png"], "required: -o/--output (such as -o out)"),
        (["heatmap", "photo.png", *OUT, "--format", "pnk"], "Did you mean png?"),
        (["heatmap", "photo.png", *OUT, "--arch", "vits14_reg"], "--model dinov2_vits14_reg"),
        (["heatmap", "photo.png", *OUT, "--arch", "vit_smal"], "Try vit_small."),
        (["heatmap", "photo.png", *OUT, "--model", "vits14_reg"], "Try dinov2_vits14_reg."),
        (["heatmap", "photo.png", *OUT, "--model", "vitb16"], "Try dinov3_vitb16."),
        (["heatmap", "photo.png", *OUT, "--model", "vit_base"], "--arch vit_base"),
        (["heatmap", "photo.png", *OUT, "--model", "dinov2_vits14_rg"], "Try dinov2_vits14_reg."),
        (
            ["heatmap", "photo.png", *OUT, "--model", "facebook/dinov2-small"],
            "--weights facebook/dinov2-small",
        ),
        (["heatmap", "photo.png", *OUT, "--model", "timm:"], "or timm:NAME"),
        (["heatmap", "photo.png", *OUT, "-q", "-v"], "not allowed with"),
    ],
)
def test_a_word_is_suggested(folder, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("usage: dinov2-attn")
    assert said in lines[1]


# Pipes, bars and completion


def test_a_reader_that_leaves_is_no_traceback(tmp_path):
    code = "import sys; from dinov2_attn.apps.cli.main import main; sys.exit(main())"
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    program.stdout.close()
    said = program.stderr.read()
    program.stderr.close()
    assert program.wait() == 141
    assert said == ""


@pytest.mark.skipif(os.name != "posix", reason="a shell closes them")
def test_streams_that_are_closed(tmp_path):
    code = (
        "import os\n"
        "from dinov2_attn.apps.cli.main import main\n"
        "status = main([])\n"
        "with open('said', 'w') as file: file.write(f'{status} {file.fileno() > 2}')\n"
    )
    closed = 'exec "$0" -c "$1" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", closed, sys.executable, code], check=True, cwd=tmp_path)
    assert (tmp_path / "said").read_text() == "0 True"


def test_another_closed_pipe_is_not_hidden(monkeypatch):
    def broken(_):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr("dinov2_attn.apps.cli.doctor.run", broken)
    with pytest.raises(BrokenPipeError, match="worker"):
        main(["doctor"])


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_script_completes_the_words_of_each_command(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("heatmap", "--queries", "--max-mb", "--outliers", "doctor"):
        assert word in script


def test_bash_completes(tmp_path, capsys):
    pytest.importorskip("shtab")
    (tmp_path / "photo.png").touch()
    main(["--print-completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    said = {}
    for line in ("he", "heatmap --thr", "heatmap --limits shared --format s", "heatmap ph"):
        words = ["dinov2-attn", *line.split()]
        ask = f"""source ./script
        COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
        _shtab_dinov2_attn
        echo "${{COMPREPLY[@]}}" """
        done = subprocess.run(
            ["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        said[line] = done.stdout.split()
    assert said["he"] == ["heatmap"]
    assert said["heatmap --thr"] == ["--threshold"]
    assert said["heatmap --limits shared --format s"] == ["svg"]
    assert said["heatmap ph"] == ["photo.png"]


def test_without_the_library_its_extra_is_named(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "pip install 'dinov2-attn[completion]'" in caplog.text
