"""The environment: only this folder reads it."""
