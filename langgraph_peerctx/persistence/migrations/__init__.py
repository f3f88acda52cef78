"""The schema's history; applied by `engine.migrate`."""

HEAD = "0001"
VERSION_TABLE = "peerctx_schema_version"
