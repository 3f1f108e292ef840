"""Which architectures merge whole: tiny random models of the installed transformers.

- `models`: text, image and audio; `vision_language`: models of several modes, with processors
- `cases`: models on the disk, and what came of each command
- `__main__`: all of it (`make bench-architectures`)
"""

REVISION = 1
"""Raised when the same model would get another verdict by this benchmark's own fault."""
