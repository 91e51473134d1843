"""The published settings as YAML files, shipped with the package so that `certtrain train digits` works anywhere."""
