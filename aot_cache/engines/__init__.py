"""Serving engines that other people wrote, with aot-cache beside them: one folder for each."""
