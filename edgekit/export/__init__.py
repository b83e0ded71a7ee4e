"""Exporters: each module writes one kind of file from a plan, under the name `write`. One file a format."""
