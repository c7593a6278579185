"""Parts of `scripts/train_draft.py`: draft heads for Llama targets, on a CPU.

layers.py        sizes, attention and the other parts that both models share
target_model.py  the target in plain torch, under its checkpoint names
draft_model.py   the EAGLE-3 head, likewise, and what all heads share
one_pass.py      heads that draft all tokens of a tree in one pass
export.py        checkpoints as SGLang and transformers read them
decoder.py       decoding of many requests in slots
answers.py       prompt files, and the target's answers to them
rows.py          texts and the target's states on disk
vocabulary.py    the tokens that the draft can propose
distill.py       training over all tokens that a head drafts
gto.py           tuning for the trees that are served: rewards, groups, the clipped surrogate
gto_trees.py     those trees, and what the target says of them
optim.py         the optimizers and the learning rate, which follows the clock
loop.py          the training loop: log, checkpoints, resume
evaluate.py      the accept length of a static tree, simulated
card.py          the model card and its curves
"""
