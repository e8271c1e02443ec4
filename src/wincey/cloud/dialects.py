"""Every cloud's dialect, loaded when a config asks for it: none of the others' libraries is imported."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from wincey.cloud.errors import CloudError
from wincey.cloud.table import Dialect
from wincey.model.cloud import CloudTable

DIALECTS: dict[str, str] = {
    "aws-vpc": "wincey.cloud.aws:AwsDialect",
    "gce": "wincey.cloud.gce:GceDialect",
    "tencent-vpc": "wincey.cloud.tencent:TencentDialect",
    "ali-vpc": "wincey.cloud.ali:AliDialect",
}
"""By backend type: the module and the class."""

Opens = Callable[[CloudTable], Dialect]


def open_dialect(table: CloudTable) -> Dialect:
    """Make the dialect of a table's provider; raises CloudError's kinds."""
    place = DIALECTS.get(table.provider)
    if place is None:
        raise CloudError(f"there is no dialect for the route tables of {table.provider!r}")
    module, _, name = place.partition(":")
    dialect: Dialect = getattr(import_module(module), name)(table)
    return dialect
