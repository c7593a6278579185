"""Copying: text that a request has already said, proposed again as drafts."""
