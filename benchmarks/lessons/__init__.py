"""Run experiments for lessons, each with one table and one chart; `benchmarks/lesson.py` lists them."""
