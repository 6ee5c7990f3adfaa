"""The page: a release runs in the visitor's own browser."""
