"""YAML configurations for `liveselect fit`."""
