"""Folders and file systems, whatever is kept in them. Imports nothing of the store: processes that load no bundle use it, too."""
