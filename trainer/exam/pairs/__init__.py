"""Preference pairs made of a model's own answers to questions."""
