"""Which tree a step drafts and verifies, by five ideas.

price       what a unit of time must bring: the tokens per time that the last steps reached
selection   the best nodes are verified while they bring more than the price of their time
lookahead   a layer is grown if it promises more than that, by the children that nodes had lately
acceptance  how likely a node is accepted, learned from what the target accepts
trying      plain decoding and other trees, for a bounded share of the time, so that it is known
            what they take
"""
