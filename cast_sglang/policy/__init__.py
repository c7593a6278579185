"""Which tree a step drafts and verifies: what a policy is asked, and the policies."""
