"""Parts of `scripts/train_tiny_pair.py`: a small target and its EAGLE-3 draft.

corpus.py        which text is read, how it becomes chat turns, what is held out
tokenizer.py     the byte-level BPE tokenizer and the token files
windows.py       windows of the token stream
prompts.py       prompts from held-out modules
layers.py        sizes, attention and the other parts that both models share
target_model.py  the target in plain torch, under its checkpoint names
draft_model.py   the draft, likewise
optim.py         the optimizers and the learning rate, which follows the clock
loop.py          the training loop: log, checkpoints, resume
train_target.py  next-token prediction
generate.py      the target's own continuations, which the draft learns from
train_draft.py   distillation over self-fed steps
evaluate.py      the accept length of a static tree, simulated
export.py        checkpoints as SGLang and transformers read them
card.py          the model card and its curves
"""
