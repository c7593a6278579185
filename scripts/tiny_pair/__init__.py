"""Parts of `scripts/train_tiny_pair.py`: a small target and its EAGLE-3 draft, trained on the Python library.

corpus.py     which text is read, how it becomes chat turns, what is held out
tokenizer.py  the byte-level BPE tokenizer and the token files
model.py      the target and the draft in plain torch, under their checkpoint names
optim.py      the optimizer pair and the learning-rate schedule on wall-clock time
target.py     training of the target
generate.py   the target's own continuations, the draft's second diet
draft.py      training of the draft, with self-fed steps
evaluate.py   held-out losses, agreement and the simulated accept length
export.py     checkpoints as SGLang and transformers read them
card.py       the model card, its curves and the held-out prompts
"""
