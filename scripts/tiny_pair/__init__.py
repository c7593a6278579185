"""Parts of `scripts/train_tiny_pair.py`; `draft_trainer` trains the draft.

corpus.py             which text is read, how it becomes chat turns, what is held out
tokenizer.py          the byte-level BPE tokenizer and the token files
windows.py            windows of the token stream
prompts.py            prompts from held-out modules
target_checkpoint.py  the sizes of the target, and its checkpoint
draft_data.py         what the draft learns from
train_target.py       next-token prediction
card.py               the model card and its curves
"""
