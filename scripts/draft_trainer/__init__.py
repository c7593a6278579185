"""Parts of `scripts/train_draft.py`: EAGLE-3 heads for Llama targets, on a CPU.

layers.py        sizes, attention and the other parts that both models share
target_model.py  the target in plain torch, under its checkpoint names
draft_model.py   the draft, likewise
export.py        checkpoints as SGLang and transformers read them
decoder.py       decoding of many requests in slots
answers.py       prompt files, and the target's answers to them
rows.py          texts and the target's states on disk
vocabulary.py    the tokens that the draft can propose
distill.py       training over self-fed steps
optim.py         the optimizers and the learning rate, which follows the clock
loop.py          the training loop: log, checkpoints, resume
evaluate.py      the accept length of a static tree, simulated
card.py          the model card and its curves
"""
