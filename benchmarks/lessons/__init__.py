"""Experiments of one screen each, for a lesson. Read next: `../lesson.py`."""
