"""Text to ids and back. To be read in this order:

* `base.py`: what every tokenizer does
* `sentencepiece.py`: `tokenizer.model`, as Llama 2 and the bundled base have it, read and trained
* `huggingface.py`: `tokenizer.json`, as Llama 3 and SmolLM have it
* `special.py`: which ids are BOS, EOS and added tokens, and whether BOS is added, by what a folder's files say
* `markers.py`: a template's markers, told apart from the same words in the data
* `guard.py`: what a `tokenizer.json` of unknown origin may not hold
* `make_json.py`: a `tokenizer.json` made of a `tokenizer.model`, for tools that read no other
* `save.py`: a tokenizer's files in a new folder
* `chat.py`: the model's own chat template: what of its text is learned
* `chat_text.py`: what it writes, and where the data are in it
* `chat_files.py`: where it comes from, and what it sees
* `jinja.py`: its language, in a sandbox
* `load.py`: the tokenizer of a model's folder, and whether it fits the model
* `stream.py`: text that is shown id by id
* `word_cache.py`: SentencePiece faster, with the same ids
"""
