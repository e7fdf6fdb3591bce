"""Pages for a browser: each is one HTML file, which asks the network for nothing.

document.py   the skeleton of every page, and what makes foreign text safe; its style is page.css
curves.py     loss and learning rate over the steps, as SVG and as a PNG
run.py        the report of a run, and the comparison of two models
audit.py      what a data set teaches: findings, lengths, and records as they train
xray.py       the next-token X-ray; what it shows on a click or a key is in xray.js
"""
