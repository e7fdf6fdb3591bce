"""Runs: the pages of the root called in order, and what a run keeps in its folder. The rooms, in reading order:

finetune.py   from files of pairs to a finished run
pretrain.py   from files of pages to a finished run
common.py     what both do: own the folder, start or resume, take the steps, write `final/`
model.py      the model before the first step: opened, with adapters; or of random weights
freeze.py     parameters that are not trained, by name
start.py      the state before the first step
machine.py    the device and the dtype to compute in, and whether a compiler pays
loop.py       step after step: saving, patience, signals
progress.py   what a run reports of each step
events.py     the same for TensorBoard
stop.py       Ctrl-C and SIGTERM
place.py      a run's place: free, numbered, or that of an earlier run
folder.py     a run's folder: its settings, its lock, its report
steps.py      `step_NNNNNN/`: the state that a resumed run continues from

    minift finetune --steps 100 --out runs/first
"""
