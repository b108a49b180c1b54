"""The file that `--external_plugins` names. It stands alone here: ms-swift puts its directory first on sys.path."""

from balora_plugin.hosts.swift.registration import register

register(__file__)
