"""Runs: the pages of the root called in order, and what a run keeps in its folder. The rooms, in reading order:

finetune.py   from files of pairs to a finished run
pretrain.py   from files of pages to a finished run
common.py     what both do: own the folder, start or resume, take the steps, write `final/`
final.py      the end of a run: `final/`, of the best weights
model.py      the model before the first step: opened, with adapters; or of random weights
freeze.py     parameters that are not trained, by name
defaults.py   the settings that are not given: from the pairs and the model's size
start.py      the state before the first step
machine.py    the device and the dtype to compute in, and whether a compiler pays
loop.py       step after step: saving, patience, signals
clock.py      when an evaluation, a save and the end are due
progress.py   what a run reports of each step
events.py     the same for TensorBoard
metrics.py    `metrics.jsonl`, read and mended
stop.py       Ctrl-C and SIGTERM
place.py      a run's place: free, numbered, or that of an earlier run
folder.py     a run's folder: its settings, its lock, its report
space.py      the space on the disk that saves need
inputs.py     the paths of a run's inputs, as any folder understands them
contents.py   what its inputs held: another base, another file is refused by name
steps.py      `step_NNNNNN/`: the state that a resumed run continues from

    minift finetune --steps 100 --out runs/first
"""
