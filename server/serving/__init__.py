"""Exported models kept by version, and served: registry, contract, engine, REST and gRPC."""
