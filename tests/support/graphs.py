"""Captured graphs without a device: what was captured is run again, and its memory used again."""


class RecordedGraphs:
    """SGLang's graph backend: keeps what it is given and runs it again.

    What a replay has returned is overwritten by the next one, as all graphs share their memory.

    Attributes:
        log: one entry for each capture and replay, with the batch size and the label of the graph.
    """

    def __init__(self):
        self.log = []
        self._graphs = {}
        self._outputs = ()

    def capture_one(self, key, forward, **kwargs):
        self.log.append(("capture", key.size, key.variant_label))
        forward()
        self._graphs[key] = forward

    def replay(self, key, batch):
        self.log.append(("replay", key.size, key.variant_label))
        outputs = tuple(part.clone() for part in self._graphs[key]())
        for part in self._outputs:
            part.fill_(-1)
        self._outputs = outputs
        return outputs
