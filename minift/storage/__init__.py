"""Files and folders on a disk that can fail. To be read in this order:

* `atomic.py`: a file or a folder is either complete or not there
* `checksums.py`: a damaged file is named before it is used
* `lock.py`: one run writes into one folder
* `links.py`: names and links that a model's folder may not hold
* `system.py`: what Windows and macOS lack, and what takes its place
* `names.py`: "bundled", names on Hugging Face's hub, and the model that an adapter is for
"""
