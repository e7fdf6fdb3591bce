"""The promise of a result: all samples, in order, with what they were measured on; and every result stays readable."""

import hashlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import benchmarks
from benchmarks import hardware, nvml, record, roof
from benchmarks.__main__ import BENCHMARKS
from minift import values
from minift.errors import InputError, RunError
from tests.helpers import ROOT, SMALL, run_here

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


class Sampled:
    def to_dict(self) -> dict[str, Any]:
        samples = [[1e9, 0.25, 4, 0, []], [1e9 + 1, 0.5, 4, 1, ["stolen"]]]
        values = {"timer": "events", "caches": "cold", "stopped": "budget", "floor_seconds": 1e-6}
        return {**values, "left_out": {"stolen": 1}, "samples": samples}


def written(tmp_path: Path, **changes: Any) -> Path:
    """A small result that is right, but for `changes`; None takes a key away."""
    result = {"benchmark": "ops", **record.environment(), "config": "stories15m", "dtype": "float32", "batch_size": 2}
    record.write(str(tmp_path / "r.json"), {**result, "rows": [record.row("norm/used", [0.1, 0.2])]})
    values = json.loads((tmp_path / "r.json").read_text()) | changes
    (tmp_path / "r.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return tmp_path / "r.json"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [
        record.row("norm/used/both/cold", Sampled(), work={"flops": 3.0, "bytes": 4}),
        record.row("minift/step", [0.1, 0.3, 0.2], per="step"),
        record.row("nothing", []),
    ]
    head = record.environment()
    file = tmp_path / "folder" / "r.json"
    record.write(
        str(file), {"benchmark": "ops", **head, "config": SMALL, "dtype": "float32", "rows": rows, "mine": [1]}
    )
    found = record.read(file)
    assert found["rows"] == rows == json.loads(file.read_text())["rows"]
    assert found["mine"] == [1]
    assert found["settings"] == {"shape": SMALL, "dtype": "float32"}
    first, second, _ = found["rows"]
    assert first == {"name": "norm/used/both/cold", "unit": "s", "per": "call", "work": {"flops": 3.0, "bytes": 4}} | (
        Sampled().to_dict()
    )
    assert second["samples"] == [[None, 0.1, 1, 0, []], [None, 0.3, 1, 1, []], [None, 0.2, 1, 2, []]]
    assert sum('"samples"' in line for line in file.read_text().splitlines()) == len(rows)  # a row is one line


def test_the_head_says_what_a_time_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    head = record.environment()
    assert head["schema"] == 2
    assert 0 < head["ended"] - head["began"] < 86_400
    assert set(head["load"]) == {"before", "during", "after"}
    for waiting, others, stolen in head["load"].values():
        assert waiting is None or waiting >= 0
        assert all(share is None or 0 <= share <= 1.01 for share in (others, stolen))
    machine = head["machine"]
    assert {"cpu", "flags", "cores", "threads", "affinity", "governor", "caches", "memory_bytes"} <= set(machine)
    if hasattr(os, "sched_getaffinity"):
        assert machine["affinity"] == sorted(os.sched_getaffinity(0))
    fields = "python torch numpy"
    assert set(fields.split()) <= set(head["versions"])


def test_the_code_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any changed, added or renamed Python file changes the digest, whatever the commit says; other files do not."""
    (tmp_path / "page.py").write_text("one = 1\n")
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(benchmarks, "__file__", str(tmp_path / "__init__.py"))
    digests = [record.code_digest()]
    (tmp_path / "result.json").write_text("{}")
    assert record.code_digest() == digests[0]
    (tmp_path / "page.py").write_text("one = 2\n")
    digests.append(record.code_digest())
    (tmp_path / "page.py").rename(tmp_path / "side.py")
    digests.append(record.code_digest())
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "new.py").write_text("")
    digests.append(record.code_digest())
    assert len(set(digests)) == 4


def test_files_are_named_and_known_by_their_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "b.jsonl", "norm.py", "shape.json"):
        (tmp_path / name).write_text(f"contents of {name}")
    data, out = str(tmp_path / "*.jsonl"), str(tmp_path / "r.json")
    variant, shape = f"{tmp_path / 'norm.py'}:fast_norm", str(tmp_path / "shape.json")
    words = ["ops", "--data", data, "bundled", "--add", variant, f"--config={shape}", f"--json={out}", "--only", "norm"]
    assert record.named_command(words) == (
        ["ops", "--data", "*.jsonl", "bundled", "--add", "norm.py:fast_norm", "--config=shape.json", "--only", "norm"]
    )
    files = record.named_files(words)
    assert {option: [one["name"] for one in found] for option, found in files.items()} == {
        "--data": ["a.jsonl", "b.jsonl"],
        "--add": ["norm.py"],
        "--config": ["shape.json"],
    }
    assert files["--add"][0]["sha256"] == hashlib.sha256(b"contents of norm.py").hexdigest()
    assert record.named_files(["--data", str(tmp_path)])["--data"][-1]["name"] == "shape.json"  # a folder's files
    monkeypatch.setattr(record, "LARGEST", 3)
    assert set(record.named_files(["--add", variant])["--add"][0]) == {"name", "bytes", "ends"}
    assert record.named_command(["load", "--folder", "/tmp/x", "--plot", "y.png", "--repeats", "1"]) == (
        ["load", "--repeats", "1"]
    )


def test_every_option_that_names_a_file_is_known() -> None:
    """A new option with a file is either an input, whose digest is recorded, or an output, which is left out."""
    import argparse

    seen = set[str]()

    def look(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for one in action.choices.values():
                    look(one)
            elif any(word in str(action.metavar) for word in ("FILE", "DIR", "GLOB")) and action.option_strings:
                seen.add(action.option_strings[-1])

    for module in BENCHMARKS.values():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        look(parser)
    assert {"--json", "--data", "--model", "--trace", "--config"} <= seen <= {*record.INPUTS, *record.OUTPUTS}


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_old_results_stay_readable(file: Path) -> None:
    result = record.read(file)
    raw = json.loads(file.read_text())
    assert result["schema"] == raw.get("schema", 1)
    assert result["machine"]["cpu"] == raw["machine"]["cpu"]
    if result["schema"] == 1:
        assert result["rows"] == []
        lost = [value for key, value in raw.items() if value not in result.values()]
        assert not lost  # a key of its own that was called "rows" has another name
    assert result["benchmark"].split()[0] in file.name


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "a newer schema": ({"schema": 3}, "schema is 3; this version of minift reads 1 and 2"),
    "a schema that is no number": ({"schema": "2"}, "schema is '2'"),
    "no machine": ({"machine": None}, "it has no machine"),
    "no code": ({"code": None}, "it has no code"),
    "a machine in words": ({"machine": "fast"}, "machine is 'fast', not an object"),
    "no rows": ({"rows": None}, "rows is not a list"),
    "rows of numbers": ({"rows": [1]}, "rows is not a list of objects"),
    "a row without a name": ({"rows": [{"samples": []}]}, "name of row 0 is None"),
    "two rows of a name": ({"rows": [{"name": "a", "samples": []}] * 2}, "name of row 1 is 'a'"),
    "a row without samples": ({"rows": [{"name": "a"}]}, "samples of a are not"),
    "a time in words": ({"rows": [{"name": "a", "samples": [[0, "fast", 1, 0, []]]}]}, "samples of a are not"),
    "a sample cut short": ({"rows": [{"name": "a", "samples": [[0, 1.0, 1]]}]}, "samples of a are not"),
    "a time that is no number": ({"rows": [{"name": "a", "samples": [[0, float("nan"), 1, 0, []]]}]}, "samples of a"),
}


@pytest.mark.parametrize(("changes", "said"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_result_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    file = written(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        record.read(file)
    assert str(error.value).startswith(f"{file}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text(written(tmp_path).read_text()[:-20])
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    for name, said in (("cut", "not valid JSON"), ("list", "not a JSON object"), ("config", "not a result of")):
        with pytest.raises(InputError, match=said):
            record.read(tmp_path / f"{name}.json")
    with pytest.raises(InputError, match="cannot be read"):
        record.read(tmp_path / "nothing.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_what_is_no_regular_file_or_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device has no end, and a pipe may have no writer: both are refused before the first byte."""
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path(os.devnull), tmp_path):
        with pytest.raises(InputError, match="not a regular file; give the file of --json"):
            record.read(file)
    with (tmp_path / "large").open("wb") as large:
        large.truncate(10**12)  # it takes no space on the disk
    with pytest.raises(InputError, match="large: 1 TB are more than the 268 MB of a result"):
        record.read(tmp_path / "large")


def test_json_is_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "LARGEST_JSON", 99)
    (tmp_path / "fits").write_text('{"a": 1}'.ljust(99))
    (tmp_path / "does not").write_text('{"a": 1}'.ljust(100))
    assert values.read_json(tmp_path / "fits") == {"a": 1}
    with pytest.raises(InputError, match="does not: larger than 99 B, the most that is read as JSON"):
        values.read_json(tmp_path / "does not")
    if Path("/dev/zero").exists():
        with pytest.raises(InputError, match="/dev/zero: larger than"):
            values.read_json("/dev/zero")


def test_a_result_that_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"r\.json: the result cannot be written: "):
        record.write(str(tmp_path / "file" / "r.json"), {"rows": []})


def test_what_a_machine_could_do_has_rows_of_its_own() -> None:
    one = {"flops": 2e12, "bandwidth": 4e9, "read_bandwidth": 5e9}
    turns = [SimpleNamespace(**one), SimpleNamespace(**{**one, "flops": 1e12})]
    rows = {row["name"]: (row["per"], [sample[1] for sample in row["samples"]]) for row in record.control(turns)}
    assert rows == {
        "machine/product": ("TFLOP", [0.5, 1.0]),  # seconds of 10^12 operations
        "machine/copy": ("GB", [0.25, 0.25]),  # and of 10^9 bytes
        "machine/read": ("GB", [0.2, 0.2]),
    }
    unread = [SimpleNamespace(**{**one, "read_bandwidth": 0.0})]
    assert {row["name"] for row in record.control(unread)} == {"machine/product", "machine/copy"}


# The machine ----------------------------------------------------------------------------------------------------------


def test_load_is_counted_without_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten seconds of two cores: four are this process's, six are another's, two went to the host, the rest idle."""
    monkeypatch.setattr(hardware, "PROC", tmp_path)
    monkeypatch.setattr(hardware, "affinity", lambda: [0, 1])
    times = iter([(1.0, 0.5, 0.0, 0.0), (3.0, 1.0, 1.0, 0.5)])
    monkeypatch.setattr(os, "times", lambda: (*next(times), 99.0))
    hertz = os.sysconf("SC_CLK_TCK")

    def stat(user: float, idle: float, stolen: float) -> None:
        cores = "".join(
            f"cpu{core} {user * hertz:.0f} 0 0 {idle * hertz:.0f} 0 0 0 {stolen * hertz:.0f} 0 0\n" for core in (0, 1)
        )
        (tmp_path / "stat").write_text(f"cpu 1 2 3 4 5 6 7 8 9 9\n{cores}cpu2 99 99 99 99 99 99 99 99\nintr 1\n")

    stat(10, 20, 1)
    before = hardware.Ticks.now()
    stat(15, 24, 2)  # each core: 5 s busy, 4 s idle, 1 s stolen
    others, stolen = hardware.shares(before, hardware.Ticks.now())
    assert others == pytest.approx((2 * 5 - 4) / 20)
    assert stolen == pytest.approx(2 / 20)
    assert hardware.shares(None, before) == (None, None)
    (tmp_path / "stat").unlink()
    assert hardware.Ticks.now() is None


def test_a_gpu_is_recorded_as_it_was() -> None:
    """One that is hot and throttled, through a library that does not say what it draws."""

    def refuse(handle: object) -> int:
        raise OSError("not supported")

    library = SimpleNamespace(
        NVMLError=OSError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlSystemGetDriverVersion=lambda: b"580.95.05",
        nvmlDeviceGetClockInfo=lambda handle, which: 1_395,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x40 | 0x04,
        nvmlDeviceGetTemperature=lambda handle, which: 84,
        nvmlDeviceGetPowerUsage=refuse,
    )
    assert hardware.state(nvml.Gpu(library, None)) == {
        "driver": "580.95.05",
        "clocks": {"megahertz": 1_395, "lowered_by": ["hardware thermal slowdown", "power cap"]},
        "watts": None,
        "celsius": 84,
    }


def test_caches_and_governor_are_those_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CORES", tmp_path)
    for core, name in ((3, "performance"), (4, "powersave")):
        (tmp_path / f"cpu{core}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "cpufreq" / "scaling_governor").write_text(name + "\n")
    for i, (level, kind, size) in enumerate(
        [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2M"), (3, "Unified", "1G")]
    ):
        folder = tmp_path / "cpu3" / "cache" / f"index{i}"
        folder.mkdir(parents=True)
        for file, text in (("level", level), ("type", kind), ("size", size)):
            (folder / file).write_text(f"{text}\n")
    assert hardware.caches([3, 4]) == {"L1d": 48 * 2**10, "L2": 2 * 2**20, "L3": 2**30}
    assert hardware.caches([4]) == {}
    assert hardware.governor([3]) == "performance"
    assert hardware.governor([3, 4]) == "performance, powersave"
    assert hardware.governor([5]) is None
    assert hardware.governor(None) is None


# What the benchmarks write --------------------------------------------------------------------------------------------


def test_medians_are_those_of_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a record says in its own keys can be computed again from its rows, which hold each sample with its time."""
    monkeypatch.setattr(roof, "SIDE", {"cpu": 32})
    monkeypatch.setattr(roof, "COPIED", {"cpu": 2**14})
    (tmp_path / "shape.json").write_text(json.dumps(SMALL))
    words = ["--config", tmp_path / "shape.json", "--device", "cpu", "--repeats", 3]

    result = run_here("ops", tmp_path, *words, "--batch-size", 2, "--length", 16, "--no-compile", "--only", "norm")
    rows = {row["name"]: [sample[1] for sample in row["samples"]] for row in result["rows"]}
    for phase in ("forward", "both"):
        for name, variant in result["operations"]["norm"]["phases"][phase]["variants"].items():
            assert record.spread(rows[f"norm/{name}/{phase}/warm"]) == variant["seconds"]
    assert len(rows["machine/product"]) == 2  # before and after

    before = time.time()
    sides = ["--sides", "minift", "minift, plain"]
    result = run_here("generate", tmp_path, *words, "--prompt-length", 4, "--new-tokens", 3, *sides)
    (model,) = result["models"].values()
    rows = {row["name"]: row for row in result["rows"]}
    for side, numbers in model["sides"].items():
        samples = rows[f"a config.json/{side}/decode"]["samples"]
        assert record.spread([1 / seconds for _, seconds, *_ in samples]) == numbers["decode_tokens_per_second"]
        assert [turn for *_, turn, _ in samples] == [0, 1, 2]
        assert all(before < at < time.time() for at, *_ in samples)
    assert len(rows["machine/product"]["samples"]) == 3
    assert result["settings"]["prompt_length"] == 4


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 seconds of the cores: 60 busy, of them 20 this process's own; 10 stolen."""
    before = hardware.Ticks(0.0, 0.0, 0.0, 0.0)
    for busy, stolen, said in ((60.0, 10.0, "other processes had 40% and the host took 10%"), (24.0, 1.0, "")):
        now = hardware.Ticks(100.0, busy, stolen, 20.0)
        monkeypatch.setattr(hardware.Ticks, "now", classmethod(lambda cls, now=now: now))
        assert said in hardware.busy_in_words(before)
        assert bool(hardware.busy_in_words(before)) == bool(said)
    assert hardware.busy_in_words(None) == ""
