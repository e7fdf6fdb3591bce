"""The promise of the report page: it says what the run's files say, and its command does the run again.

How it looks and behaves in a browser is in `look/test_pages_in_a_browser.py`.
"""

import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from minift.cli import main
from minift.cli.commands import make_parser
from minift.cli.train import train_options
from minift.config import FINETUNE, PRETRAIN, LlamaConfig
from minift.costs.flops import count_parameters
from minift.costs.memory import training_memory
from minift.look.pages.curves import COLUMNS, Curves, curves_of, powers_of_ten, svg, thinned, ticks
from minift.look.pages.document import data, text
from minift.look.pages.run import comparison_page, run_command, run_page
from minift.look.report import LABELS, samples
from minift.runs.finetune import finetune, finetune_job
from minift.runs.pretrain import pretrain, pretrain_job
from minift.values import size
from tests.helpers import SMALL, write_jsonl


class Text(HTMLParser):
    """The words of a page, and its tags."""

    def __init__(self, page: str):
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("report")
    pairs = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(30)]
    config = FINETUNE.replace(steps=4, eval_every=2, warmup=1, device="cpu", dtype="float32", lora_rank=2, lr=1e-2)
    finetune(finetune_job(str(small_checkpoint), [str(write_jsonl(folder / "x.jsonl", pairs))]), config, folder / "run")
    return folder / "run"


def test_the_page_says_what_the_files_say(run: Path) -> None:
    page = run_page(run)
    assert page == (run / "report.html").read_text(encoding="utf-8")
    words = " ".join(Text(page).words)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    compared = json.loads((run / "compare.json").read_text())
    assert f"4 steps over {sum(step['tokens'] for step in metrics):,} tokens, in float32" in words
    assert f"from {metrics[0]['loss']:,.3f} at step 1 to {metrics[-1]['loss']:,.3f} at step 4" in words
    assert f"{compared['after']['perplexity']:,.3f}" in words
    for sample in compared["samples"]:
        assert sample["question"] in words
    settings = json.loads((run / "config.json").read_text())["train"]
    for name in settings:
        assert name in words
    if find_spec("matplotlib") is not None:
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_ledger_of_adapters(run: Path) -> None:
    """Rank 2 in all matrices of 2 layers: gradients and moments are of those numbers alone."""
    trained = 2 * 2 * (2 * (24 + 24) + 2 * (12 + 24) + 3 * (40 + 24))
    words = " ".join(Text(run_page(run)).words)
    assert f"{trained:,} numbers of adapters" in words
    assert re.search(rf"gradients\s+{size(4 * trained)}\s", words)
    assert re.search(rf"AdamW's two moments\s+{size(8 * trained)}\s", words)
    shape = LlamaConfig(**SMALL)
    full, part = (training_memory(shape, "float32", 2, 16, trained=trained) for trained in (None, 100))
    total = count_parameters(shape).total
    assert full["gradients"] - part["gradients"] == 4 * (total - 100)
    assert part["weights"] - full["weights"] == 400


def test_the_command_does_the_run_again(run: Path) -> None:
    """Parsed by the command line itself, it is the same job with the same settings."""
    saved = json.loads((run / "config.json").read_text())
    words = shlex.split(run_command(saved, run))
    assert words[0] == "minift"
    options = vars(make_parser().parse_args(words[1:]))
    assert (options.pop("run").__name__, options.pop("out")) == ("_finetune", str(run))
    assert FINETUNE.replace(**train_options(options)).to_dict() == saved["train"]
    inputs = {"model": options["model"], "data": options["data"], "test": [], "encoding": "utf-8", "fields": []}
    assert inputs == saved["inputs"]
    assert "--encoding" not in words
    saved["inputs"]["encoding"] = "cp1252"
    saved["inputs"]["fields"] = ["asked", "told"]
    assert "--encoding cp1252 --fields asked told" in run_command(saved, run)


def test_a_pretraining_run_has_a_page_too(tmp_path: Path) -> None:
    from minift.storage.names import bundled

    (tmp_path / "shape.json").write_text(json.dumps({**SMALL, "vocab_size": 2_048}))
    pages = write_jsonl(
        tmp_path / "pages.jsonl", [{"text": f"This is page {i} of a small corpus. " * 8} for i in range(40)]
    )
    job = pretrain_job(str(tmp_path / "shape.json"), [str(pages)], str(bundled("base")))
    config = PRETRAIN.replace(steps=2, batch_size=2, max_length=32, device="cpu", dtype="float32", strict=True)
    assert pretrain(job, config, tmp_path / "run")
    words = " ".join(Text((tmp_path / "run" / "report.html").read_text(encoding="utf-8")).words)
    assert "Pretraining" in words
    assert "Before and after" not in words
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    options = vars(make_parser().parse_args(shlex.split(run_command(saved, tmp_path / "run"))[1:]))
    assert PRETRAIN.replace(**train_options(options)).to_dict() == saved["train"]


def copy_with(run: Path, tmp_path: Path, metrics: list[dict[str, Any]]) -> Path:
    """The run again, with other steps."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in metrics))
    return copy


def test_speed_is_the_median_and_time_the_sum(run: Path, tmp_path: Path) -> None:
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    speeds, seconds = [100.0, 900.0, 400.0, 300.0, 200.0], [0.5, 1.0, 2.0, 4.0, 8.0]
    steps = [
        {**first, "step": i + 1, "tokens_per_second": speed, "seconds": taken}
        for i, (speed, taken) in enumerate(zip(speeds, seconds, strict=True))
    ]
    words = " ".join(Text(run_page(copy_with(run, tmp_path, steps))).words)
    assert "300 tokens a second (median of the steps; from 100 to 900)" in words
    assert "The steps took 15.5 s in total" in words


def test_the_samples_are_counted() -> None:
    """What changed, and what is right before and after, of all of them; the first 100 are shown."""
    # before, after, right
    kinds = [("a", "a", "a"), ("a", "b", "b"), ("b", "a", "b"), ("a", "c", "b"), ("c", "b", "b")]
    samples = [
        {"question": f"Question {i}?", "before": kinds[i % 5][0], "after": kinds[i % 5][1], "answer": kinds[i % 5][2]}
        for i in range(5 * 24)
    ]
    scores: dict[str, Any] = dict.fromkeys(LABELS) | {"n": 0, "n_token_f1": 0, "intervals": {}}
    result = {"before": scores, "after": scores, "difference": {}, "skipped": 0, "samples": samples}
    page = comparison_page(result, [LlamaConfig(**SMALL)] * 2, "minift compare")
    words = " ".join(" ".join(Text(page).words).split())
    assert "96 of 120 answers changed. Exactly right: 48 before, 72 after." in words
    assert words.count("(changed)") == 80  # of the 100 that are shown
    assert words.count("✓ right") == 40 + 60
    assert "… and 20 more" in words


def test_an_answer_that_was_cut_is_marked() -> None:
    """In a page and in a terminal. A comparison of an earlier version does not say what was cut."""
    sample = {"question": "Who?", "answer": "I", "before": "I am", "after": "I"}
    scores: dict[str, Any] = dict.fromkeys(LABELS) | {"n": 0, "n_token_f1": 0, "intervals": {}}
    result = {"before": scores, "after": scores, "difference": {}, "skipped": 0}
    for ended in ({"before_ended": False, "after_ended": True}, {}):
        result["samples"] = [{**sample, **ended}]
        page = comparison_page(result, [LlamaConfig(**SMALL)] * 2, "minift compare")
        words = " ".join(" ".join(Text(page).words).split())
        assert ("before I am … (cut) after I (changed) ✓ right" in words) == bool(ended)
        assert ("  before  I am … (cut)\n  after   I\n  right   I" in samples(result, 1)) == bool(ended)
        assert words.count("(cut)") == samples(result, 1).count("(cut)") == bool(ended)


def test_compare_writes_a_page(run: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "held out.jsonl", [{"question": "What <is> it?", "answer": "It is & was."}])
    words = ["compare", str(small_checkpoint), str(run / "final"), "--data", str(data)]
    assert main([*words, "--html", str(tmp_path / "x.html"), "--device", "cpu"]) == 0
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    seen = " ".join(Text(page).words)
    assert shlex.join(["minift", *words, "--template", "auto"]) in seen
    assert "What <is> it?" in seen
    assert "It is & was." in seen
    assert "<is>" not in page
    assert main([*words, "--html", str(tmp_path / "nowhere" / "x.html")]) == 2


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 3.1), (1, 1), (0, 1e-4), (1, 20_000), (0, 1e9), (0.2, 0.3), (1, 2)])
def test_ticks_are_round_and_hold_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in pairwise(found)}
    assert steps == {1.0}
    mantissa = (found[1] - found[0]) / 10 ** math.floor(math.log10(found[1] - found[0]) + 1e-9)
    assert round(mantissa, 6) in (1, 2, 5, 10)


def test_powers_of_ten() -> None:
    assert powers_of_ten(0.02, 3.0) == pytest.approx([0.01, 0.1, 1.0, 10.0])
    assert powers_of_ten(1.0, 1.0) == [1.0, 10.0]


def test_a_long_line_is_averaged_and_nothing_left_out() -> None:
    points = [(float(i), float(i % 7)) for i in range(10 * COLUMNS + 3)]
    thin = thinned(points)
    assert len(thin) <= COLUMNS
    size_of = 11
    assert thin[0] == (pytest.approx(5.0), pytest.approx(sum(i % 7 for i in range(size_of)) / size_of))
    assert thinned(points[:5]) == points[:5]


def test_a_curve_is_where_its_values_are() -> None:
    figure = svg(Curves("Loss", "step", "nats", {"training": [(0.0, 0.0), (10.0, 5.0)]}))
    (places,) = re.findall(r'points="([^"]+)"', figure)
    (x0, y0), (x1, y1) = (tuple(map(float, place.split(","))) for place in places.split())
    labels = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', figure))
    heights = {float(value): float(y) - 4 for y, value in labels.items()}
    assert y0 == pytest.approx(heights[0.0], abs=0.1)
    assert y1 == pytest.approx(heights[5.0], abs=0.1)
    assert x0 < x1


def test_a_loss_that_falls_far_gets_a_logarithmic_axis() -> None:
    def losses(*values: float) -> Curves:
        return curves_of([{"step": i + 1, "loss": value, "lr": 1e-4} for i, value in enumerate(values)])[0]

    assert losses(3.0, 0.001).log
    assert not losses(3.0, 2.0).log
    assert not losses(3.0, 0.0).log  # which has no logarithm
    assert svg(losses(3.0, 0.0))


def test_what_is_held_out_decides_the_axis() -> None:
    """On a logarithmic axis, which the training loss alone would ask for, 2.45 and 3.09 are nearly the same."""
    records = [
        {"step": 1, "loss": 3.0, "lr": 1e-4, "validation_loss_before": 2.6, "validation_loss": 2.45},
        {"step": 2, "loss": 0.001, "lr": 1e-4, "validation_loss": 3.09},
    ]
    chart = curves_of(records)[0]
    assert not chart.log
    assert list(chart.lines["held out"]) == [(0.0, 2.6), (1, 2.45), (2, 3.09)]
    records[1]["validation_loss"] = 0.02
    assert curves_of(records)[0].log


def test_the_numbers_of_an_axis_have_room() -> None:
    chart = Curves("Rate", "step", "each", {"rate": [(0, 0.0), (100, 0.00019)]})
    labels = re.findall(r'text-anchor="end">([^<]*)<', svg(chart))
    assert [float(label) for label in labels] == pytest.approx([0.0, 5e-5, 1e-4, 1.5e-4, 2e-4])
    assert max(map(len, labels)) <= 6


def test_text_leaves_nothing_to_obey() -> None:
    assert text("<b a='x' c=\"y\">&amp;") == "&lt;b a=&#x27;x&#x27; c=&quot;y&quot;&gt;&amp;amp;"
    assert text("a\0\x1b\u202e\ud800\n\u200d") == "a\\x00\\x1b\\u202e\\ud800\n\u200d"


def test_data_cannot_end_its_element() -> None:
    packed = data("x", {"text": "</script><!--"})
    assert packed.count("</script>") == 1
    assert json.loads(packed.split(">", 1)[1].rsplit("<", 1)[0]) == {"text": "</script><!--"}
