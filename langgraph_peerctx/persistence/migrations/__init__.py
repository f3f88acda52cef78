"""The schema's history; applied by `upgrade.upgrade`."""

HEAD = "0001"
VERSION_TABLE = "peerctx_schema_version"
