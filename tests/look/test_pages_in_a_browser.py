"""The promise of the pages: they open in a real browser, ask for nothing, show every word and obey none of them, and
can be read by pointing, tapping and typing, on a phone, in the dark, and by a screen reader.

The browser is the system's Chromium; where there is none, these tests are skipped.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from minift.config import FINETUNE, LlamaConfig, TrainConfig
from minift.data.audit import Audit, audit
from minift.data.templates import template_named
from minift.look.explain import XRay, explain
from minift.look.pages.audit import audit_page
from minift.look.pages.run import comparison_page
from minift.look.pages.xray import xray_page
from minift.look.report import visible
from minift.pack import Example
from minift.prompts import Pair
from minift.tokenizer.base import Tokenizer
from tests.helpers import SMALL, encode_pair, small_model

sync_api = pytest.importorskip("playwright.sync_api")
Browser, BrowserContext, Page = sync_api.Browser, sync_api.BrowserContext, sync_api.Page
Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe

HOSTILE = (
    '<script>window.hacked = 1</script><img src=x onerror="window.hacked=2"> \'quoted\' "twice" & &amp; '
    "שלום عربي \u202eevil\u202c 🦙👩\u200d🔬 nul\0bell\x07 </script><!-- é\nsecond line\ttab ▁ ⏎ ]]>"
)
SIZES = {"desktop": (1200, 800), "phone": (390, 844)}


@dataclass
class Opened:
    """A page in the browser, and what it has asked for and complained about."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium is installed: pages are not opened")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, request: pytest.FixtureRequest) -> Iterator[BrowserContext]:
    size, scheme = getattr(request, "param", ("desktop", "light"))
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=size == "phone"
    )
    yield context
    context.close()


everywhere = pytest.mark.parametrize(
    "context",
    [("desktop", "light"), ("phone", "dark")],
    indirect=True,
    ids=lambda value: "-".join(value),
)


def open_page(context: BrowserContext, folder: Path, html: str) -> Opened:
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    opened = Opened(context.new_page())
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.on("console", lambda message: opened.complaints.append(message.text))
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.goto(file.as_uri())
    return opened


def check(opened: Opened) -> None:
    """Nothing was asked for but the file, nothing failed, nothing from a text was obeyed, nothing sticks out."""
    assert len(opened.requests) == 1
    assert opened.requests[0].startswith("file:")
    assert opened.complaints == []
    assert opened.page.evaluate("window.hacked") is None
    assert opened.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    found = Axe().run(opened.page)  # contrast, landmarks, names, roles, order of headings, …
    assert found.violations_count == 0, found.generate_report()
    assert not [one for one in found.response["incomplete"] if one["id"] != "color-contrast"]


@pytest.fixture(scope="module")
def hostile_xrays(tokenizer: Tokenizer) -> dict[str, XRay]:
    """Two random models on a question and its answer, both of them hostile; so is a model's name."""
    config = TrainConfig(dtype="float32", device="cpu")
    pairs = [Pair("Who?", HOSTILE), Pair("Short?", "Yes.")]
    found = {}
    for seed, name in enumerate(["one", "runs/<b onclick='x'>\u202e\0"]):
        model = small_model(seed, vocab_size=tokenizer.vocab_size, max_position_embeddings=600, std=0.3)
        examples = [encode_pair(pair, template_named("qa"), tokenizer, 600) for pair in pairs]
        found[name] = explain(model, tokenizer, [e for e in examples if e], config)
    return found


@everywhere
def test_an_xray(context: BrowserContext, tmp_path: Path, hostile_xrays: dict[str, XRay]) -> None:
    opened = open_page(context, tmp_path, xray_page(hostile_xrays))
    page = opened.page
    for number, xray in enumerate(hostile_xrays.values()):
        tokens = page.locator(f"[data-model='{number}'] .t")
        shown = [text.replace("\n", "") for text in tokens.all_text_contents()]
        texts = [xray.texts[at.next] for at in xray.positions]
        assert shown == [visible(text, space=" " if text.strip(" ") else "▁") for text in texts]  # each of them
        learned = page.locator(f"[data-model='{number}'] .t.learned")
        assert learned.count() == xray.n_targets
    page.locator(".t").nth(9).click()
    page.locator("summary").click()
    page.wait_for_selector("#all tbody tr")
    assert page.locator("#all tbody tr").count() == sum(len(xray.positions) for xray in hostile_xrays.values())
    check(opened)


def panel_of(page: Page) -> str:
    return re.sub(r"\s+", " ", page.locator("#panel").inner_text())


def described(xray: XRay, index: int) -> str:
    at = xray.positions[index]
    return f"{visible(xray.texts[at.token])} → {visible(xray.texts[at.next])}"


def test_pointing_reveals_the_alternatives(
    context: BrowserContext, tmp_path: Path, hostile_xrays: dict[str, XRay]
) -> None:
    page = open_page(context, tmp_path, xray_page(hostile_xrays)).page
    first, second = hostile_xrays.values()
    index = next(i for i, at in enumerate(first.positions) if at.learned)
    page.locator("[data-model='0'] .t").nth(index).hover()
    shown = panel_of(page)
    for xray in (first, second):  # the same position of both
        at = xray.positions[index]
        assert described(xray, index) in shown
        assert f"rank {at.rank}," in shown
        assert f"nll {at.nll:.3f} nats" in shown
        for entry in (*at.likeliest, *at.gradient):
            assert visible(xray.texts[entry.id]) in shown
    assert page.locator(".t.here").count() == 2
    assert page.locator("#panel table").count() == 4  # likeliest and gradient, of each
    page.locator("[data-model='0'] .t").nth(0).hover()
    assert described(first, 0) in panel_of(page)
    assert page.locator("#panel table").count() == 2  # of what is given, nothing is pulled on


def test_typing_reveals_the_alternatives(
    context: BrowserContext, tmp_path: Path, hostile_xrays: dict[str, XRay]
) -> None:
    (xray, _) = hostile_xrays.values()
    page = open_page(context, tmp_path, xray_page({"one": xray})).page
    page.keyboard.press("Tab")
    assert described(xray, 0) in panel_of(page)
    assert page.evaluate("document.activeElement.getAttribute('role')") == "option"
    for key, index in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", -1), ("ArrowRight", -1)]:
        page.keyboard.press(key)
        assert described(xray, index) in panel_of(page)
    page.keyboard.press("Home")
    top = page.evaluate("document.activeElement.getBoundingClientRect().top")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") > top
    page.keyboard.press("ArrowUp")
    assert described(xray, 0) in panel_of(page)
    assert page.locator("[aria-selected='true']").count() == 1
    page.keyboard.press("Tab")  # one stop for the whole text, one for the panel, which may have to be scrolled
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


@pytest.mark.parametrize("context", [("phone", "light")], indirect=True)
def test_tapping_reveals_the_alternatives(
    context: BrowserContext, tmp_path: Path, hostile_xrays: dict[str, XRay]
) -> None:
    (xray, _) = hostile_xrays.values()
    page = open_page(context, tmp_path, xray_page({"one": xray})).page
    page.locator(".t").nth(4).tap()
    assert described(xray, 4) in panel_of(page)
    page.locator(".t").nth(2).tap()
    assert described(xray, 2) in panel_of(page)


def test_4096_tokens(context: BrowserContext, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Under 3 MB and a second, two models side by side."""
    config, ids = TrainConfig(dtype="float32", device="cpu"), [3 + i * 7 % 2_000 for i in range(4_096)]
    xrays = {}
    for seed in range(2):
        model = small_model(seed, vocab_size=tokenizer.vocab_size, max_position_embeddings=4_096, std=0.3)
        xrays[f"model {seed}"] = explain(model, tokenizer, [Example([tokenizer.bos_id], ids)], config)
    html = xray_page(xrays)
    assert len(html.encode()) < 3e6
    opened = open_page(context, tmp_path, html)
    assert opened.page.locator(".t").count() == 2 * 4_096
    # Milliseconds, the best of five: other tests, and on a shared machine other guests, run at the same time.
    taken = []
    for _ in range(5):
        times = json.loads(opened.page.evaluate("JSON.stringify(performance.getEntriesByType('navigation')[0])"))
        taken.append(times["loadEventEnd"])
        opened.page.reload()
    assert min(taken) < 1_000, taken


RESULT: dict[str, Any] = {
    "template": "plain",
    "before": {"exact_match": 0.0, "exact_match_normalised": 0.0, "token_f1": None, "perplexity": 1e9},
    "after": {"exact_match": 0.5, "exact_match_normalised": 0.5, "token_f1": None, "perplexity": 1.0},
    "difference": {
        name: {"value": 0.5, "low": 0.25, "high": 0.75}
        for name in ("exact_match", "exact_match_normalised", "perplexity", "bits_per_byte", "next_token_accuracy")
    },
    "skipped": 3,
    "samples": [
        {"question": HOSTILE, "answer": HOSTILE, "before": "", "after": HOSTILE},
        {"question": "Same?", "answer": "No", "before": "unchanged", "after": "unchanged"},
        *({"question": f"Question {i}?", "answer": "a", "before": "b", "after": "c" * 300} for i in range(120)),
    ],
}
for side in ("before", "after"):
    RESULT[side] |= {"bits_per_byte": 1.0, "next_token_accuracy": 0.5, "n": 4, "n_token_f1": 0}
    RESULT[side]["intervals"] = {"exact_match": [0.0, 1.0]}


@everywhere
def test_a_comparison(context: BrowserContext, tmp_path: Path) -> None:
    shape = LlamaConfig(**SMALL)
    opened = open_page(context, tmp_path, comparison_page(RESULT, [shape, shape], f"minift compare {HOSTILE}"))
    page = opened.page
    check(opened)
    assert page.locator(".sample").count() == 100
    assert "… and 22 more" in page.inner_text("main")
    first, second = page.locator(".sample").nth(0), page.locator(".sample").nth(1)
    assert first.locator("mark").count() == 1
    assert "✓ right" in first.inner_text()
    assert "(nothing)" in first.inner_text()
    assert second.locator("mark").count() == 0
    assert "right\n" not in second.locator("dd").nth(1).inner_text()
    assert "<script>window.hacked = 1</script>" in first.locator("h3").inner_text()
    assert "\\u202eevil\\u202c" in first.locator("h3").inner_text()
    assert "nul\\x00bell\\x07" in first.locator("h3").inner_text()
    assert "👩\u200d🔬" in first.locator("h3").inner_text()


@everywhere
def test_the_report_of_a_run(context: BrowserContext, tmp_path: Path, small_checkpoint: Path) -> None:
    from minift.runs.finetune import finetune, finetune_job

    data = tmp_path / "pairs <b>.jsonl"
    lines = [{"question": f"What is {i}?", "answer": f"It is {i}. <i>"} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = FINETUNE.replace(steps=3, eval_every=1, warmup=1, device="cpu", dtype="float32")
    finetune(finetune_job(str(small_checkpoint), [str(data)]), config, tmp_path / "run")
    opened = open_page(context, tmp_path, (tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    check(opened)
    headings = opened.page.locator("h2").all_text_contents()
    assert headings == ["Command", "Before and after", "Curves", "Samples", "Speed", "Memory", "Settings"]
    assert opened.page.locator("svg").count() == 2
    assert "pairs <b>.jsonl" in opened.page.inner_text("pre")


def audit_of(file: Path, tokenizer: Tokenizer, lines: list[dict[str, Any]], **settings: Any) -> Audit:
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return audit([file], tokenizer, FINETUNE.replace(**settings), samples=20)


@everywhere
def test_an_audit(context: BrowserContext, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Every token of a record is shown, and what is learned of it is what its batch says."""
    lines = [{"question": f"What is {i}?", "answer": f"It is {i}.", "hint": "x"} for i in range(40)]
    lines[1] = {"question": HOSTILE, "answer": HOSTILE + "cafÃ©" * 60}
    lines[2] = {"question": "word " * 700, "answer": "None of it fits."}
    lines[3] = {**lines[0], "answer": "Otherwise. &amp;"}
    result = audit_of(tmp_path / "pairs <b>\u202e.jsonl", tokenizer, lines, max_length=600)
    opened = open_page(context, tmp_path, audit_page(result, "runs/<b onclick='x'>"))
    page = opened.page
    check(opened)
    assert page.locator("h2").all_text_contents()[:2] == ["Changes what is learned or measured", "Worth knowing"]
    names = page.locator(".card h3").all_text_contents()
    assert names == [finding.name for finding in result.findings]
    assert {"answers cut", "records dropped", "wrong encoding", "keys not read", "contradictions"} <= set(names)
    assert page.locator(".sample").count() == len(result.samples)
    for number, sample in enumerate(result.samples):
        shown = page.locator(f"#record{number} .tokens")
        assert shown.count() == len(sample.examples)
        if sum(map(len, sample.examples)) < 100:
            (pieces,) = sample.examples
            tokens = shown.locator("i").all_text_contents()
            assert [text.replace("\n", "") for text in tokens] == [visible(one.text, space=" ") for one in pieces]
            learned = shown.locator("mark.learned i").all_text_contents()
            assert len(learned) == sum(one.state == "learned" for one in pieces)
    assert page.locator("s.cut i").count() > 100
    page.get_by_role("link", name="See the record.").first.click()
    assert page.evaluate("location.hash").startswith("#record")
    assert page.locator("svg .limit").count() == 1


def test_the_page_of_an_audit_is_small_whatever_the_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": "é<" * 3_000} for i in range(60)]
    chats = [{"messages": turns[: 2 * (i % 29) + 2 + i % 2], "hint": "x" * 10_000} for i in range(60)]
    result = audit_of(tmp_path / f"{'x' * 200}.jsonl", tokenizer, chats, max_length=16)
    assert {"roles out of order", "records dropped", "duplicates"} <= {one.name for one in result.findings}
    assert len(audit_page(result, "m" * 1_000).encode()) < 3e6
    long = audit_of(tmp_path / "long.jsonl", tokenizer, chats, max_length=100_000)
    assert len(audit_page(long, "bundled").encode()) < 3e6


def test_an_audit_without_findings(context: BrowserContext, tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(4)]
    opened = open_page(context, tmp_path, audit_page(audit_of(tmp_path / "x.jsonl", tokenizer, lines), "bundled"))
    check(opened)
    assert "None." in opened.page.inner_text("main")


def test_on_paper(context: BrowserContext, tmp_path: Path, hostile_xrays: dict[str, XRay]) -> None:
    page = open_page(context, tmp_path, xray_page(hostile_xrays)).page
    page.locator(".t").nth(3).click()
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("#panel").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('.t')).printColorAdjust") == "exact"
    assert page.pdf().startswith(b"%PDF")
