"""The schema's history; applied by `upgrade.upgrade`."""

HEAD = "0003"
VERSION_TABLE = "peerctx_schema_version"
