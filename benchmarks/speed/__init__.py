"""Whole merges: time, memory, and what the start-up hook costs."""
