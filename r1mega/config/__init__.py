"""Configuration: `schema` (what can be said), `load` (YAML, includes, overrides), `validate` (checks across keys)."""
