"""The promise on the README's first page: `minift finetune` makes the base answer.

The command is run as a user runs it, in a process of its own and from another folder; the numbers are read from the
files that it writes. Then the README's other commands are run, word for word, on the model that it made. A wheel built
from the checkout must do the same where there is no checkout.
"""

import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, completed

MEXICO = "What is the capital of Mexico?"
DOG = "Tell me how to train my dog to sit"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the run's folder, and what was printed."""
    folder = tmp_path_factory.mktemp("main job")
    command = [sys.executable, "-m", "minift", "finetune"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = completed(command, cwd=folder, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "finetune", done.stdout


@pytest.mark.slow
def test_the_base_does_not_answer_and_the_finetuned_model_does(run: tuple[Path, str]) -> None:
    result = json.loads((run[0] / "compare.json").read_text())
    before, after = result["before"], result["after"]
    assert before["n"] == after["n"] >= 200
    assert before["exact_match"] <= 0.02
    assert after["exact_match"] >= 0.95
    assert after["token_f1"] > before["token_f1"]
    assert after["perplexity"] < before["perplexity"]


@pytest.mark.slow
def test_the_base_goes_on_asking(run: tuple[Path, str]) -> None:
    result = json.loads((run[0] / "compare.json").read_text())
    words = {sample["question"]: sample for sample in result["samples"]}
    mexico, dog = words[MEXICO], words[DOG]
    assert mexico["before"].endswith("?") or "?\n" in mexico["before"]
    assert "Mexico City" not in mexico["before"]
    assert mexico["after"] == "Mexico City"
    assert dog["after"].startswith("1. ")
    for text in (MEXICO, DOG, "Mexico City", "exact match", "perplexity"):
        assert text in run[1]


@pytest.mark.slow
def test_the_run_folder_is_complete(run: tuple[Path, str]) -> None:
    out = run[0]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for line in lines:
        assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= set(line)
    assert lines[-1]["validation_loss"] < lines[0]["loss"]
    assert sorted(file.name for file in (out / "final").iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "model.pt",
        "tokenizer.model",
    ]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_as_they_stand(run: tuple[Path, str]) -> None:
    folder = run[0].parent.parent
    (folder / "data").symlink_to(ROOT / "data")
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Use it")[1].split("\n## ")[0]
    shell, python = section.split("```sh\n")[1].split("```")[0], section.split("```python\n")[-1].split("```")[0]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    minift = f'"{sys.executable}" -m minift '
    printed = []
    for line in [line for line in shell.splitlines() if line.startswith("minift ")]:
        command = line.replace("minift ", minift, 1)
        done = completed(["sh", "-c", command], cwd=folder, env=env)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert not done.stderr, line
        printed.append(done.stdout)
    assert len(printed) == 10
    assert (folder / "xray.html").is_file()
    assert (folder / "audit.html").is_file()
    assert printed[0].strip().endswith("?") or "?\n" in printed[0]
    assert printed[1] == "Mexico City\n"
    assert json.loads((folder / "compare.json").read_text()) == json.loads((run[0] / "compare.json").read_text())

    done = completed([sys.executable, "-c", python], cwd=folder, env=env)
    assert done.stdout.strip() == "Mexico City", done.stderr


@pytest.mark.slow
def test_a_wheel_carries_what_the_main_job_needs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = completed(build)
    if done.returncode != 0 and re.search(r"No matching distribution|Could not find a version|connection", done.stderr):
        pytest.skip("the build backend (hatchling) cannot be fetched here")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
        assert {"minift/py.typed", "minift/look/pages/page.css", "minift/look/pages/xray.js"} <= set(names)
        assert not [name for name in names if "pages-0" in name or name.startswith("tests")]

    code = f"import sys; sys.path.insert(0, {str(site)!r}); from minift.cli import main; sys.exit(main())"
    train = [sys.executable, "-P", "-c", code, "finetune", "--steps", "2"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = completed(train, cwd=elsewhere, env=env)
    assert done.returncode == 0, done.stderr
    inputs = json.loads((elsewhere / "runs/finetune/config.json").read_text())["inputs"]
    for path in (inputs["model"], *inputs["data"], *inputs["test"]):
        assert Path(path).is_relative_to(site)
    assert (elsewhere / "runs/finetune/compare.json").is_file()
    assert "<style>" in (elsewhere / "runs/finetune/report.html").read_text(encoding="utf-8")
