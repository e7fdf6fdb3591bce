"""Pages to look at in a browser: one file each, that asks the network for nothing. Read next: `document.py`."""
