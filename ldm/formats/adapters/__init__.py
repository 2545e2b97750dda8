"""Other people's adapters, in and out: `read_adapter`, `write_adapter`, and `adapter_kind` of a path."""

from ldm.formats.adapters.io import FORMATS, AdapterKind, adapter_kind, read_adapter, write_adapter
from ldm.formats.adapters.kind import located

__all__ = ["FORMATS", "AdapterKind", "adapter_kind", "located", "read_adapter", "write_adapter"]
