"""How it is computed: processes, precision, compilation, memory, files."""
