"""The promise of `ops --add`: a function of a user's own is timed when it is right, and has its error otherwise.

Every kind of wrong that a student hands in is made here on purpose, and must be recognised as what it is.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import added, ops, roof
from benchmarks.contract import CONTRACTS, describe
from benchmarks.operation import Operation, Setting, Step, make_step
from benchmarks.operations import OPERATIONS
from benchmarks.user_file import WrongError, check_named, load
from benchmarks.variant import Trial
from minift.config import LlamaConfig
from minift.errors import InputError
from tests.helpers import SMALL

SHAPE = LlamaConfig(**{**SMALL, "initializer_range": 0.2})
RIGHT = "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight"


@pytest.fixture(autouse=True)
def no_module_is_left() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("added_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def steps() -> dict[torch.dtype, Step]:
    return {dtype: make_step(Setting(SHAPE, 2, 12, dtype, "cpu")) for dtype in (torch.float32, torch.bfloat16)}


def write(folder: Path, body: str) -> Path:
    file = folder / "my_file.py"
    file.write_text("import torch\n" + textwrap.dedent(body))
    return file


def trial(file: Path, name: str, step: Step, function: str | None = None) -> tuple[Trial, Operation]:
    operation, dtype = OPERATIONS[name](step), str(step.setting.dtype).removeprefix("torch.")
    limits = ops.AGREE[dtype], ops.AGREE["float32"]
    return Trial(f"{file}:{function or name}", name, step, operation, limits), operation


def parsed(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ops.add_arguments(parser)
    return parser.parse_args([*map(str, words)])


def error_of(file: Path, name: str, step: Step, again: bool = False) -> str:
    one, _ = trial(file, name, step)
    if not again:
        with pytest.raises(WrongError) as raised:
            one.check()
    else:
        one.check()
        call = one.call()
        for _ in range(20):
            call()
        with pytest.raises(WrongError) as raised:
            one.check_again()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Right ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONTRACTS)
def test_the_file_to_start_from_is_right(
    name: str, dtype: torch.dtype, steps: dict[torch.dtype, Step], tmp_path: Path
) -> None:
    """It keeps the contract that it states, for every operation; so its formula agrees with `operations.py`'s own."""
    file = tmp_path / "start.py"
    file.write_text(describe(name))
    one, operation = trial(file, name, steps[dtype])
    before = [leaf.detach().clone() for leaf in operation.leaves]
    one.check()
    found = one.call()()
    one.check_again()
    assert all(torch.equal(*pair) for pair in zip(before, operation.leaves, strict=True)), "the inputs are as before"
    naive = operation.variants["naive"]()
    if operation.leaves:
        for ours, theirs in zip(found, naive, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


STYLES = {
    "lines": f"""
        def norm(x, weight, eps):
            return {RIGHT}
        """,
    "the library's": """
        from functools import partial
        def norm(x, weight, eps, rms_norm=torch.nn.functional.rms_norm):
            return rms_norm(x, x.shape[-1:], weight, eps)
        """,
    "a module": f"""
        class Norm(torch.nn.Module):
            def forward(self, x, weight, eps):
                return {RIGHT}
        norm = Norm()
        """,
    "its own backward pass": """
        class Norm(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, eps):
                scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
                ctx.save_for_backward(x, weight, scale)
                return x * scale * weight
            @staticmethod
            def backward(ctx, grad):
                x, weight, scale = ctx.saved_tensors
                n, g = x * scale, grad * weight
                rest = (g * n).mean(-1, keepdim=True)
                return scale * (g - n * rest), (grad * n).flatten(0, -2).sum(0), None
        def norm(x, weight, eps):
            return Norm.apply(x, weight, eps)
        """,
    "a dataclass and a buffer that is made once": f"""
        from dataclasses import dataclass
        @dataclass
        class Kept:
            tables: dict
        kept = Kept({{}})
        def norm(x, weight, eps):
            one = kept.tables.setdefault(x.shape[-1], torch.ones(()))
            return {RIGHT} * one
        """,
}


@pytest.mark.parametrize("style", STYLES)
def test_any_style_is_right(style: str, steps: dict[torch.dtype, Step], tmp_path: Path) -> None:
    one, _ = trial(write(tmp_path, STYLES[style]), "norm", steps[torch.float32])
    one.check()
    one.call()()
    one.check_again()


# Wrong ----------------------------------------------------------------------------------------------------------------

WRONG = {  # the body of norm(x, weight, eps), or a whole file, and what its error says
    "a wrong value": (f"return 1.01 * {RIGHT}", "the value is 1.0e-02 off the formula's"),
    "no eps": ("return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * weight", "off the formula's"),
    "eps of its own": (f"eps = 1e-5; return {RIGHT}", "for other inputs in the same tensors, the value is"),
    "no weight": (f"weight = weight.detach(); return {RIGHT}", "no gradient reaches weight"),
    "ones for a weight": (f"weight = 0 * weight + 1; return {RIGHT}", "the gradient of weight is 1.0e+00 off"),
    "one wrong row": (f"y = {RIGHT}; return torch.cat((y[:, :-1], 0 * y[:, -1:]), 1)", "off the formula's"),
    "a wrong gradient": (f"y = {RIGHT}; return y.detach() + 2 * (y - y.detach())", "the gradient of x is 1.0e+00 off"),
    "nothing": (RIGHT, "None, not a torch.Tensor (is there a return?)"),
    "NumPy": (f"return ({RIGHT}).detach().numpy()", "an ndarray, not a torch.Tensor"),
    "a parameter": (f"return torch.nn.Parameter({RIGHT})", "a Parameter, not a torch.Tensor"),
    "two values": (f"y = {RIGHT}; return y, y", "returns 2 values; expected [B, T, D] float32"),
    "a wrong shape": (f"return ({RIGHT})[:, 1:]", "returns [2, 11, 24] float32 on cpu; expected [2, 12, 24]"),
    "a wrong dtype": (f"return ({RIGHT}).bfloat16()", "bfloat16 on cpu; expected [2, 12, 24] float32"),
    "a wrong device": (f"return ({RIGHT}).to('meta')", "float32 on meta; expected"),
    "detached": (f"return ({RIGHT}).detach()", "a tensor without grad_fn"),
    "NaN": (f"y = {RIGHT}; return torch.where(y == y.max(), torch.nan, y)", "1 of 576 numbers of the value are NaN"),
    "in place": ("x.mul_(2); return x", "my_file.py:3: the forward pass raises RuntimeError: a leaf Variable"),
    "in place, by .data": (f"y = {RIGHT}; x.data.mul_(2); return y", "it changes its input x in place"),
    "an error": (f"return {RIGHT} + nothing", "my_file.py:3: the forward pass raises NameError: name 'nothing'"),
    "an end": ("raise SystemExit(3)", "my_file.py:3: the forward pass raises it ends the program by SystemExit: 3"),
    "random": (
        f"y = {RIGHT}; return y + 2e-5 * torch.randn_like(y)",
        "called again with the same inputs, the value is",
    ),
    "threads": (f"torch.set_num_threads(torch.get_num_threads() + 1); return {RIGHT}", "number of threads from"),
    "a dtype for all": (f"torch.set_default_dtype(torch.float64); return {RIGHT}", "default dtype from torch.float32"),
    "a thread": (
        f"import threading; threading.Thread(target=threading.Event().wait, args=(2,)).start(); return {RIGHT}",
        "it leaves a thread running",
    ),
    "a result that is kept": (f"kept.setdefault(0, {RIGHT}); return kept[0]", "it keeps a result of an earlier call"),
    "a value that is kept": (
        f"y = {RIGHT}; kept.setdefault(0, y.detach()); return kept[0] + y - y.detach()",
        "for other inputs in the same tensors, the value is",
    ),
    "a value for each tensor": (
        f"y = {RIGHT}; k = id(x); kept.setdefault(k, y.detach()); return kept[k] + y - y.detach()",
        "for other inputs in the same tensors, the value is",
    ),
    "memory that is used again": (
        "return Same.apply(x, weight, eps)",
        "two calls return the same memory",
    ),
    "state": (f"n[0] += 1; return {RIGHT} if n[0] < 2 else 2 * {RIGHT}", "called again with the same inputs"),
}
BEFORE = """
kept, n = {}, [0]
class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.scale = scale
        return kept.setdefault("out", torch.empty_like(x)).copy_(x * scale * weight)
    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        n, g = x * ctx.scale, grad * weight
        return ctx.scale * (g - n * (g * n).mean(-1, keepdim=True)), (grad * n).flatten(0, -2).sum(0), None
"""


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(kind: str, steps: dict[torch.dtype, Step], tmp_path: Path) -> None:
    body, said = WRONG[kind]
    settings = torch.get_num_threads(), torch.get_default_dtype()
    step = steps[torch.float32]
    stream = step.stream.clone()
    file = write(tmp_path, f"def norm(x, weight, eps):\n    {body}\n{BEFORE}")
    assert said in error_of(file, "norm", step)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == settings
    assert torch.equal(step.stream, stream), "the inputs of the others are as before"


def test_a_result_that_is_kept_for_unchanged_tensors(steps: dict[torch.dtype, Step], tmp_path: Path) -> None:
    """It is right for all inputs, in new memory at each call, and does nothing while it is timed."""
    body = """
        kept = {}
        class Kept(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, eps):
                key = (id(x), x._version, weight._version)
                if key not in kept:
                    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
                    kept[key] = x * scale * weight, scale
                ctx.save_for_backward(x, weight, kept[key][1])
                return kept[key][0].clone()
            @staticmethod
            def backward(ctx, grad):
                x, weight, scale = ctx.saved_tensors
                n, g = x * scale, grad * weight
                return scale * (g - n * (g * n).mean(-1, keepdim=True)), (grad * n).flatten(0, -2).sum(0), None
        def norm(x, weight, eps):
            return Kept.apply(x, weight, eps)
        """
    assert "it does less work" in error_of(write(tmp_path, body), "norm", steps[torch.float32])


def test_what_goes_wrong_later_is_found_after_timing(steps: dict[torch.dtype, Step], tmp_path: Path) -> None:
    body = f"n = [0]\ndef norm(x, weight, eps):\n    n[0] += 1\n    return {RIGHT} * (1 if n[0] < 10 else 2)\n"
    said = error_of(write(tmp_path, body), "norm", steps[torch.float32], again=True)
    assert said.startswith("after it was timed, for other inputs, the value is 1.0e+00 off")


OTHERS = {
    "attention": ("query, key, value", "no mask", "F(query, key, value, enable_gqa=True)"),
    "rope": ("query, key, cos, sin", "only the queries", "(query * cos, key)"),
    "loss": ("hidden, weight, targets", "the mean", "C((hidden @ weight.T).flatten(0, 1).float(), targets.flatten())"),
    "qkv": ("x, query, key, value", "two of three", "(x @ query.T, x @ key.T)"),
    "swiglu": ("x, gate, up, down", "no silu", "(x @ gate.T) * (x @ up.T) @ down.T"),
    "embedding": ("tokens, weight", "another row", "weight[(tokens + 1) % len(weight)]"),
    "clip": ("gradients, max_norm", "nothing", "None"),
    "adamw": (
        "w, g, m, s, step, lr, b, c, eps, decay",
        "only weights",
        "[a.sub_(lr * b.sign()) for a, b in zip(w, g)]",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_wrong_functions_of_other_operations(name: str, steps: dict[torch.dtype, Step], tmp_path: Path) -> None:
    arguments, _, result = OTHERS[name]
    body = "F, C = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.cross_entropy\n"
    file = write(tmp_path, body + f"def {name}({arguments}):\n    return {result}\n")
    assert "off the formula's" in (said := error_of(file, name, steps[torch.float32])) or "returns 2 values" in said


def test_targets_that_do_not_count_do_not_count(steps: dict[torch.dtype, Step], tmp_path: Path) -> None:
    """The batch that is timed has none; so this is seen only with other inputs."""
    body = """
        def loss(hidden, weight, targets):
            p = (hidden @ weight.T).float().log_softmax(-1)
            return -p.gather(-1, targets.clamp_min(0)[..., None]).sum()
        """
    assert "for other inputs in the same tensors" in error_of(write(tmp_path, body), "loss", steps[torch.float32])


# Files ----------------------------------------------------------------------------------------------------------------

FILES = {
    "def norm(x, weight, eps)\n    return x\n": "my_file.py:2: SyntaxError: expected ':'",
    "import nonesuch_at_all\n": "my_file.py:2: ModuleNotFoundError: No module named 'nonesuch_at_all'",
    "x = 1\ny = x / 0\n": "my_file.py:3: ZeroDivisionError: division by zero",
    "raise SystemExit\n": "my_file.py:2: it ends the program by SystemExit: no message",
    "def nrom(x): return x\n": "my_file.py: no function norm (did you mean nrom?); there is nrom",
    "pass\n": "my_file.py: no function norm; there is none",
    "norm = 3\n": "my_file.py: norm is an int, not a function",
    "def norm(x, weight): return x\n": "it has the arguments (x, weight), but gets (x, weight, eps)",
    "torch.set_num_threads(torch.get_num_threads() + 1)\ndef norm(x, weight, eps): return x\n": "number of threads",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_cannot_be_used(text: str, steps: dict[torch.dtype, Step], tmp_path: Path) -> None:
    assert FILES[text] in error_of(write(tmp_path, text), "norm", steps[torch.float32])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "from torch import Tensor\nEPS = 1e-6\ndef norm(x): ...\ndef fast_norm(x): ...\n",
            "no function nofn; there is norm, fast_norm",
        ),
        ("def nofm(x): ...\n", "no function nofn (did you mean nofm?); there is nofm"),
        ("class nofn: ...\ndef norm():\n    def nofn(): ...\n", "no function nofn; there is norm"),
        ("x = 1\ndef nofn(:\n", "my_file.py:3: SyntaxError: "),
    ],
)
def test_a_function_that_is_not_there_is_said_before_anything_is_run_or_measured(
    text: str, said: str, tiny: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roof, "meter", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(ops.floor, "measure", lambda *_: pytest.fail("measured"))
    file = write(tmp_path, f"{text}\nraise RuntimeError('run')\n" if "(:" not in text else text)
    with pytest.raises(InputError) as raised:
        ops.run(parsed(*tiny, "--add", f"{file}:nofn", "--against", "norm"))
    assert said in str(raised.value)
    assert str(raised.value).endswith(said) or "Syntax" in said


@pytest.mark.parametrize(
    "text",
    [
        "norm = torch.compile(torch.relu)",
        "if torch.cuda.is_available():\n    def norm(x): ...\nelse:\n    norm: object = torch.relu",
        "try:\n    from somewhere import norm\nexcept ImportError:\n    pass",
        "from torch.nn.functional import *",
        "first, (norm, last) = torch.relu, (torch.relu, 3)",
        "from torch import relu as norm",
    ],
)
def test_a_function_may_be_bound_in_any_way(text: str, tmp_path: Path) -> None:
    check_named(f"{write(tmp_path, text)}:norm")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("my_norn.py:norm", "my_norn.py: no such file (did you mean my_norm.py?)"),
        ("my_norm.py", "my_norm.py: expected FILE.py:NAME, for example my_norm.py:fast_norm"),
        ("my_norm.py:", "expected FILE.py:NAME"),
        ("my_norm.txt:norm", "my_norm.txt: expected a Python file"),
    ],
)
def test_a_place_that_names_no_function(place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my_norm.py", "my_norm.txt"):
        Path(name).write_text("")
    with pytest.raises(InputError) as raised:
        load(place)
    assert said in str(raised.value)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    monkeypatch.setitem(roof.SIDE, "cpu", 32)
    monkeypatch.setitem(roof.COPIED, "cpu", 2**14)
    (tmp_path / "shape.json").write_text(json.dumps(SMALL))
    size = ["--batch-size", 2, "--length", 12, "--repeats", 6, "--dtype", "float32", "--device", "cpu", "--no-compile"]
    return ["--config", tmp_path / "shape.json", *size, "--caches", "warm"]


def test_a_run_times_the_right_ones_and_names_the_wrong(
    tiny: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, f"def good(x, weight, eps): return {RIGHT}\ndef bad(x, weight, eps): return x * weight\n")
    words = [*tiny, "--add", f"{file}:good", "--add", f"{file}:bad", "--against", "norm"]
    assert ops.run(parsed(*words, "--json", tmp_path / "result.json")) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["operations"]) == ["norm"]
    for phase in result["operations"]["norm"]["phases"].values():
        assert list(phase["variants"]) == ["naive", "used", "good"]
    assert "error" not in result["added"]["good"]
    assert "off the formula's" in result["added"]["bad"]["error"]
    assert len(result["added"]["good"]["sha256"]) == 64
    printed = capsys.readouterr().out
    assert "bad: wrong: the value is" in printed
    assert "good" in printed.splitlines()[-1] or "left out" in printed.splitlines()[-1]
    assert "step_seconds" not in result


def test_nothing_is_timed_when_all_are_wrong(
    tiny: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "measure", lambda *_, **__: pytest.fail("timed"))
    file = write(tmp_path, "def bad(x, weight, eps): return x * weight\n")
    assert ops.run(parsed(*tiny, "--add", f"{file}:bad", "--against", "norm")) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--add", "HERE:fast_norm"], "--add needs --against OPERATION, of .*; for fast_norm, perhaps --against norm"),
        (["--add", "HERE:norm", "--against", "nrom"], r"nrom: no such operation \(did you mean norm\?\)"),
        (["--add", "HERE:norm", "--against", "layer"], "layer: no function of your own can be added: a layer is made"),
        (["--against", "norm"], "--against is for --add and --rank"),
        (["--add", "HERE:norm", "--against", "norm", "--only", "norm"], "--only is for minift's own variants"),
        (["--add", "HERE:norm", "--add", "HERE:norm", "--against", "norm"], "given twice"),
        (["--limit", "3"], "--limit is for --rank"),
        (["--contract", "nrom"], "did you mean norm"),
    ],
)
def test_options_that_do_not_fit(words: list[str], said: str, tmp_path: Path) -> None:
    file = write(tmp_path, "")
    options = parsed(*(word.replace("HERE", str(file)) for word in words))
    with pytest.raises(InputError, match=said):
        ops.run(options)


def test_functions_of_one_name_keep_their_files(tmp_path: Path) -> None:
    places = []
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text("")
        places.append(f"{tmp_path / name}:norm")
    assert list(added.named(places)) == ["one.py:norm", "two.py:norm"]
    assert list(added.named([places[0].replace(":norm", ":used")])) == ["one.py:used"]
    assert list(added.named(places[:1])) == ["norm"]


def test_a_sentence_for_each_finding() -> None:
    assert (
        added.sentence("mine", (1.4, 1.3, 1.5)) == "mine is 1.40 times as fast as used, in 95 % between 1.30 and 1.50"
    )
    assert "undecided" in added.sentence("mine", (1.4, 0.9, 1.5))
    noisy = "too noisy to tell: mine is 0.74 times as fast as used, in 95 % between 0.22 and 0.95"
    assert added.sentence("mine", (0.74, 0.22, 0.95)) == noisy
    assert "6 turns" in added.sentence("mine", (1.4, float("-inf"), float("inf")))
    assert "--batch-size" in added.sentence("mine", None)
