"""Private helpers without a layer of their own: whole files, tables in a terminal, several processes."""
