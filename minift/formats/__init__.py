"""The formats that a Llama comes in: recognised, opened and written. To be read in this order:

* `files.py`: files of named tensors, read when asked for and written one tensor at a time
* `pt_file.py`: PyTorch's files of tensors, `.pt`, `.pth` and `.bin`
* `pickle_guard.py`: what the pickle in such a file may hold
* `safetensors_file.py`: Hugging Face's files of tensors, `.safetensors`
* `shapes.py`: the parameters' names and shapes, and a model without weights
* `opened.py`: a model on disk, opened but not read; the two layouts of RoPE
* `native.py`: minift's own folder
* `generation.py`: the stop tokens of Hugging Face's folder, and what else it asks of `generate`
* `carried.py`: what else is in Hugging Face's folder, which training does not change
* `huggingface.py`: Hugging Face's folder
* `meta.py`: Meta's folder
* `llama2c.py`: llama2.c's file
* `peft.py`: an adapter's folder, and the model that it makes of its base
* `open.py`: the one function that opens any of them
* `convert.py`: one format written as another
"""
