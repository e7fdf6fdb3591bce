"""Results for people to look at: in a terminal, and as pages for a browser.

explain.py   the next-token X-ray: what the loss sees at every position of a text
report.py    scores, samples and X-rays as text for a terminal
chat_templates.py   what is done with chat templates: a table
audit.py     what a data set teaches, as text for a terminal
pages/       the same as HTML pages, which need no network
"""
