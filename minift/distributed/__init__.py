"""Several processes that train one model: the few calls that differ from one process.

world.py       the processes, and how they agree
sharding.py    a model that every rank holds, or of which each holds a part
shards.py      a sharded run's state on disk
"""
