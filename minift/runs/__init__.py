"""Runs: the pages of the root called in order, and what a run keeps in its folder. The rooms, in reading order:

finetune.py   from files of pairs to a finished run
pretrain.py   from files of pages to a finished run
common.py     what both do: own the folder, start or resume, take the steps, write `final/`
defaults.py   the settings that are not given: from the pairs and the model's size
start.py      the state before the first step
machine.py    the device and the dtype to compute in, and whether a compiler pays
loop.py       step after step: saving, patience, signals
progress.py   what a run reports of each step
stop.py       Ctrl-C and SIGTERM
folder.py     a run's folder: its settings, its lock, its report
steps.py      `step_NNNNNN/`: the state that a resumed run continues from

    minift finetune --steps 100 --out runs/first
"""
