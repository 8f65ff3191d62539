"""Identities: what a call, a cell or a value is, as digests the same in every process and for all time."""

from ._formats import in_format
from ._graph import Fingerprint, Fingerprinter, digest_of
from ._identities import globals_stored, hash_value, identify, object_of, of_call, of_value, source_of
from ._modules import data_in, remember_import
from ._owners import is_installed
from ._reductions import without_passing
from ._source import attribute_uses, imported, names_loaded, nested_codes, normalise
from ._tokens import FORMAT
from ._trees import children, nodes, walk
from ._values import lasting_parts
from ._walk import Opaque, Unhashable

__all__ = [
    "FORMAT",
    "Fingerprint",
    "Fingerprinter",
    "Opaque",
    "Unhashable",
    "attribute_uses",
    "children",
    "data_in",
    "digest_of",
    "globals_stored",
    "hash_value",
    "identify",
    "imported",
    "in_format",
    "is_installed",
    "lasting_parts",
    "names_loaded",
    "nested_codes",
    "nodes",
    "normalise",
    "object_of",
    "of_call",
    "of_value",
    "remember_import",
    "source_of",
    "walk",
    "without_passing",
]
