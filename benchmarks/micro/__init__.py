"""Times of single parts, without serving: the tensor ops and the policies."""
