"""Typed settings of every command, read from YAML and KEY=VALUE, checked before anything else is loaded."""
