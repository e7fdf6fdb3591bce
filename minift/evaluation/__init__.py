"""Is a model better? Scores on held-out data, and how sure they are.

intervals.py    a score is a ratio of sums; its 95 % interval, and that of a difference, by the bootstrap
likelihood.py   perplexity, bits per byte, next-token accuracy: how probable a model finds a text
evaluate.py     a model's own answers, compared with the right ones; two models side by side
choices.py      multiple choice, by likelihood
mistakes.py     the answers worth reading, by the ways in which generated text fails
"""
