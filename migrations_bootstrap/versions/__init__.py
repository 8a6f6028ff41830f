"""The revisions, oldest first. Indexes that can fail are not here but in indexes.py."""
