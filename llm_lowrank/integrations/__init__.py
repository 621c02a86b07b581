"""The library inside of training code that others wrote: a loop of one's own, transformers' Trainer, TRL's SFTTrainer.

Here is what stands between the hooks of a method and code that knows none of them. Methods, engines and formats are not
here: what a foreign loop trains is what the library's own loop would have trained on the same batches.
"""
