"""The texts of the package: there are some of each kind."""

from cast_sglang.serving.texts import read_texts


def test_texts_are_of_every_kind():
    texts = read_texts()
    kinds = [kind for kind, _ in texts]
    assert {kinds.count(kind) for kind in ("code", "chat", "prose")} == {4}
    # Even a batch of three has each.
    assert set(kinds[:3]) == {"code", "chat", "prose"}
