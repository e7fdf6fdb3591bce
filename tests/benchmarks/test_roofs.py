"""The promise of `benchmarks/roof.py` and `python -m benchmarks roofs`: roofs are the highest rates, in their units.

Clocks are not real ones: a product takes what the test says, a processor slows down when the test says.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import roof, roofline, roofs
from minift.errors import InputError
from tests.helpers import run_here


class Clock:
    """A clock that moves when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def maker(clock: Clock, rate: Callable[[roof.Shape], float], made: list[roof.Shape]) -> Any:
    """Return what makes products that reach the FLOPs a second that `rate` says."""

    def make(shape: roof.Shape) -> Callable[[], None]:
        M, N, K = shape
        made.append(shape)

        def multiply() -> None:
            clock.now += 2 * M * N * K / rate(shape)

        return multiply

    return make


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "SIDE", {"cpu": 16})
    monkeypatch.setattr(roof, "COPIED", {"cpu": 2**16})


# The search of shapes -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_the_search_finds_the_fastest_shape_of_the_grid() -> None:
    """Wherever it is: here the last to be tried."""
    clock, made = Clock(), list[roof.Shape]()
    fastest = roof.grid(16)[-1]
    make = maker(clock, lambda shape: 3e9 if shape == fastest else 1e9, made)
    tried = roof.search("cpu", torch.float32, 1e9, clock, make)
    assert (tried[0].shape, tried[0].flops) == (fastest, pytest.approx(3e9))
    assert all(one.flops == pytest.approx(1e9) for one in tried[1:])
    assert sorted(made) == sorted(one.shape for one in tried) == sorted(roof.grid(16))
    assert len(set(made)) == len(roof.SIZES) ** 3


@pytest.mark.usefixtures("small")
def test_the_search_ends_with_its_budget_and_begins_with_the_square() -> None:
    """Each of its shapes takes four calls: one to warm up, three that are timed. One shape is tried at any rate."""
    clock, made = Clock(), list[roof.Shape]()

    def make(shape: roof.Shape) -> Callable[[], None]:
        made.append(shape)

        def multiply() -> None:
            clock.now += 1.0

        return multiply

    assert len(roof.search("cpu", torch.float32, 19.0, clock, make)) == 5
    assert made[0] == (16, 16, 16)
    assert len(roof.search("cpu", torch.float32, 1e-9, clock, make)) == 1


def test_shapes_nearest_to_the_square_come_first() -> None:
    shapes = roof.grid(2_048)
    assert shapes[0] == (2_048, 2_048, 2_048)
    assert all(sum(n != 2_048 for n in shape) == 1 for shape in shapes[1:7])
    assert {n for shape in shapes for n in shape} == {1_024, 1_536, 2_048, 3_072, 4_096}


@pytest.mark.parametrize("shape", [(3, 5, 7), (7, 5, 3), (5, 7, 3)])
def test_a_product_has_its_shape(shape: roof.Shape) -> None:
    """Its random matrices have the size of the largest of the three."""
    found = roof.products("cpu", torch.bfloat16, 35)(shape)()
    assert found.shape == shape[:2]
    assert found.dtype == torch.bfloat16
    assert found.abs().min() > 0  # no row or column is missing


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("nbytes", "read"), [(float("inf"), 2**16), (2**15, 2**15), (2**15 + 5_000, 2**15), (10.0, 2**13)]
)
def test_a_reading_reads_what_it_says(nbytes: float, read: int) -> None:
    """In whole rows of `ROW` numbers of eight bytes; and each way reads all of it."""
    loads = roof.Loads("cpu", torch.float32, (2, 2, 2), nbytes)
    assert {amount for name, amount in loads.amounts.items() if name.startswith("read/")} == {read}


def test_each_way_reads_every_number() -> None:
    """The largest number changes every one of the results, wherever it is."""
    for place in (0, 1_023, 1_024, 4_095):
        tensor = torch.rand(4_096)
        before = {name: call() for name, call in roof.readings(tensor).items()}
        tensor[place] = 9.0
        for name, call in roof.readings(tensor).items():
            found, old = call(), before[name]
            assert isinstance(found, torch.Tensor)
            assert isinstance(old, torch.Tensor)
            assert found.nbytes < tensor.nbytes / 500 or found.numel() <= 4
            assert not torch.equal(found, old), name


@pytest.mark.usefixtures("small")
def test_the_amounts_of_the_loads() -> None:
    """2·M·N·K operations; a copy's bytes read and written; the matrix of a matrix-vector product."""
    amounts = roof.Loads("cpu", torch.bfloat16, (2, 3, 5)).amounts
    assert (amounts["product"], amounts["copy"], amounts["matvec"]) == (60, 2**16, 2**15)


def test_of_several_roofs_the_highest_of_each_value_counts() -> None:
    a = roof.Roof("float32", 3.0, 1.0, 1.0, 5.0, (1, 2, 3))
    b = roof.Roof("float32", 2.0, 4.0, 2.0, 4.0, (4, 5, 6))
    assert roof.best([a, b]) == roof.best([b, a]) == roof.Roof("float32", 3.0, 4.0, 2.0, 5.0, (1, 2, 3))


# Boost and sustained --------------------------------------------------------------------------------------------------


def test_a_processor_that_slows_down_has_two_rates() -> None:
    """It computes 8e9 a second for ten seconds, and 5e9 after them: a second says 8, the last half of a minute 5."""
    clock = Clock()

    def multiply() -> None:
        clock.now += 1e6 / (8e9 if clock.now < 10 else 5e9)

    found = roof.rates(multiply, 1e6, 60.0, "cpu", clock)
    assert 57 <= len(found) <= 61
    assert roof.boost_and_sustained(found) == {"boost": pytest.approx(8e9), "sustained": pytest.approx(5e9)}
    assert found[:8] == pytest.approx([8e9] * 8)
    assert found[-40:] == pytest.approx([5e9] * 40)


def test_the_rate_of_one_second() -> None:
    clock = Clock()

    def multiply() -> None:
        clock.now += 0.3

    assert roof.rates(multiply, 6.0, 1.0, "cpu", clock) == [pytest.approx(20.0)]


# The command ----------------------------------------------------------------------------------------------------------


WORDS = ("--dtype", "float32", "--device", "cpu", "--repeats", 3)


@pytest.mark.usefixtures("small")
def test_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "BOOST", 0.01)
    result = run_here("roofs", tmp_path, *WORDS, "--budget", 0.05)
    assert roof.Roof(**result["roof"]).read_bandwidth > 0
    assert result["sustained"] is None
    assert result["product_in_a_second"] > 0
    assert [one["flops"] for one in result["tried"]] == sorted((one["flops"] for one in result["tried"]), reverse=True)
    assert result["roof"]["shape"] == result["tried"][0]["shape"]
    rows = {row["name"]: row for row in result["rows"]}
    assert {"machine/product", "machine/copy", "machine/matvec", "machine/read/sum of int64"} <= set(rows)
    for row in rows.values():
        (amount,) = row["work"].values()
        rates = [amount / seconds for _, seconds, *_ in row["samples"]]
        spread = result["rates"][row["name"].removeprefix("machine/")]
        assert (min(rates), max(rates), len(rates)) == (spread["min"], spread["max"], 3)
    assert rows["machine/product"]["work"].keys() == {"flops"}
    assert result["rates"][result["fastest_reading"]]["max"] == result["roof"]["read_bandwidth"]
    printed = capsys.readouterr().out
    assert "read-only roof" in printed
    assert "the fastest of" in printed
    assert "of the sheet" not in printed


@pytest.mark.usefixtures("small")
def test_a_minute_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(roofs.time, "sleep", asked.append)

    def rates(call: object, work: float, seconds: float, device: str) -> list[float]:
        asked.append(seconds)
        return [4e12, 3e12, 2e12, 2e12]

    monkeypatch.setattr(roof, "rates", rates)
    result = run_here("roofs", tmp_path, *WORDS, "--budget", 0.05, "--sustained")
    assert asked == [10.0, 60.0]  # it rests, so that the first seconds have the boost clock
    assert result["sustained"] == {"boost": 4e12, "sustained": 2e12, "seconds": 60.0}
    assert (
        "product for 60 seconds: 4,000 GFLOP/s in the fastest, 2,000 in the last half (0.50)" in capsys.readouterr().out
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("words", [("--budget", 0), ("--budget", "nan"), ("--repeats", 0)])
def test_wrong_input(tmp_path: Path, words: tuple[object, ...]) -> None:
    with pytest.raises(InputError, match=str(words[0])):
        run_here("roofs", tmp_path, *WORDS, *words)


def test_a_gpu_is_compared_with_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product with the rate of its dtype, all else with the bandwidth of its memory."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    sheet = roofs.data_sheet(torch.device("cuda"), "bfloat16")
    assert sheet is not None
    assert (sheet["flops"], sheet["bandwidth"]) == (312e12, 2039e9)
    assert roofs.data_sheet(torch.device("cpu"), "bfloat16") is None
    lines = roofs.table(
        {
            "dtype": "bfloat16",
            "device": "cuda",
            "threads": 4,
            "rates": {
                "product": {"median": 200e12, "min": 100e12, "max": 234e12, "n": 3},
                "read/sum of float32": {"median": 1.5e12, "min": 1e12, "max": 1.75354e12, "n": 3},
            },
            "roof": roof.Roof("bfloat16", 234e12, 1.0, 1.0, 1.75354e12, (8, 4, 2)).to_dict(),
            "fastest_reading": "read/sum of float32",
            "tried": [{"shape": (8, 4, 2), "flops": 234e12}, {"shape": (1, 2, 4), "flops": 10e12}],
            "shapes": 125,
            "product_in_a_second": 220e12,
            "sustained": None,
            "data_sheet": sheet,
        }
    ).splitlines()
    assert lines[2].split()[-1] == "0.75"
    assert lines[3].split()[-1] == "0.86"
    assert "[8, 2] x [2, 4], the fastest of 2 of 125 shapes" in lines[4]
    assert lines[-1] == f"sheet: {sheet['source']}"


# The plot -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (4e9, ["copy 2.0 GB/s", "product 8 GFLOP/s", "read only 4.0 GB/s"]),
        (0.0, ["copy 2.0 GB/s", "product 8 GFLOP/s"]),  # an older record
    ],
)
def test_the_plot_shows_each_roof_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: float, said: list[str]
) -> None:
    """Each slope is its bandwidth times the intensity, up to the product's rate; their ends are the ridges."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda figure: None)
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, file: None)  # which takes longest
    whole = {"intensity": 0.5, "flops": 1e6, "variants": {"used": {"seconds": {"median": 1e-3}}}}
    machine = roof.Roof("float32", 8e9, 2e9, 1e9, read)
    result = {"operations": {"norm": {"phases": {"both": whole}}}, "roof": machine.to_dict(), "device": "cpu"}
    roofline.draw({**result, "batch_size": 2, "length": 8}, str(tmp_path / "plot.png"))
    axes = plt.gcf().axes[0]
    assert sorted(text.get_text() for text in axes.texts if "/s" in text.get_text()) == said
    solid, *dashed = (line.get_xydata().tolist() for line in axes.lines)
    assert solid[1] == [4.0, 8e9]
    assert [line[1] for line in dashed] == ([[2.0, 8e9]] if read else [])
    assert all(
        y == pytest.approx(x * rate)
        for (x, y), rate in zip([solid[0], *(d[0] for d in dashed)], [2e9, read], strict=False)
    )
