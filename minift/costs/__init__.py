"""What a model costs, computed from its config: nothing here runs a model.

flops.py           weights, operations of a pass, the share of a GPU's peak
peaks.py           the peaks of common GPUs, each with its source
memory.py          a ledger of bytes, in training and in inference
communication.py   what the ranks of DDP and of FSDP send each other in a step
info.py            all of it as one page: `minift info`
"""
