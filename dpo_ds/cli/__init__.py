"""Reads argv, chooses between implementations and composes the rooms once."""
