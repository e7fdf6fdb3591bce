"""The same numbers, sooner: what takes the place of the plain formulas, where, and what it buys.

    file               stands in for                  taken                                     buys
    norm.py            RMSNorm, RoPE                  wherever nothing is compiled              1.05 x
    attention.py       ScaledDotProduct               a CPU                                     1.0 x, more on a Xeon
    flex.py            ScaledDotProduct, Prepare      a GPU                                     memory: no T² mask
    cross_entropy.py   NextTokenLoss                  always                                    1.04 x, 390 MB
    targets.py         the last layer, Objective      always, where few positions have targets  1.04 x
    layer.py           DecoderLayer, Prepare          a CPU, bfloat16, full finetuning, ≤ 256 T 1.24 x
    adamw.py           torch.optim.AdamW              always                                    1.5 s of every start
    malloc.py          the C library's malloc         a CPU                                     1.66 x
    compiling.py       torch.compile's memory budget  compiled runs                             a quarter less kept
    decode.py          one more token of one text     a CPU                                     2.0 x; stories15m 3.5 x
    graph.py           one more token of each text    a GPU                                     7.7 x

The files down to compiling.py are installed by name, `install(model, ["norm", "attention"])`; `generate` asks for the
other two itself. What they buy is a step of stories15m on two cores of an AMD EPYC, over the step without them (`python
-m benchmarks ladder`); for the last two it is tokens a second of smollm2-135m (`generate`), there and on an H200.

    choice.py          which of them a run takes
    decoding.py        which decoder generates the next token
    swap.py            how they get into a model

The way from text to a changed weight reads without this folder: nothing in the root of `minift/` imports it, but
`generate.py` and `runner.py`, which ask for what is fast. `runs/start.py` calls `install(objective, choose(config,
device))`, `--plain` leaves that out, and `python -m benchmarks ladder` installs one name more at each rung. Each file
of the table names the plain twin that it must equal; `tests/kernels/` holds the two together in value and in gradient.
"""

from minift.kernels.choice import choose as choose
from minift.kernels.choice import choose_for_reading as choose_for_reading
from minift.kernels.decoding import fast_decoder as fast_decoder
from minift.kernels.swap import ALL as ALL
from minift.kernels.swap import install as install
from minift.kernels.swap import with_kernels as with_kernels
