"""Recipes that ship with aot-cache."""
