"""The schema's history; applied by `upgrade.upgrade`."""

HEAD = "0002"
VERSION_TABLE = "peerctx_schema_version"
