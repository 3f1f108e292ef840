"""Recipes as YAML: read without losing what is written twice."""

from __future__ import annotations

from typing import Any

import yaml

from cart_plugin.errors import CheckpointError

_MERGE = "tag:yaml.org,2002:merge"  # `<<`, of which a mapping may have several


class _Loader(yaml.SafeLoader):
    """YAML's own, but for keys that stand twice in a mapping: of those it takes the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Look at the keys as they are written, before `<<` brings in others."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            first = lines.get((key.tag, key.value))
            if first is not None:
                raise CheckpointError(
                    f"{key.value!r} is written twice in one mapping, in lines {first} and {line}: "
                    "YAML drops the first without a word",
                    "write both as one, or delete one",
                )
            lines[key.tag, key.value] = line
        return node


def read(text: str) -> Any:
    """The one document of a text.

    Raises:
        CheckpointError: a key stands twice in one of its mappings.
        yaml.YAMLError: it is no YAML, or several documents.
    """
    return yaml.load(text, Loader=_Loader)


def read_all(text: str) -> list[Any]:
    """All documents of a text; errors as `read`."""
    return list(yaml.load_all(text, Loader=_Loader))
