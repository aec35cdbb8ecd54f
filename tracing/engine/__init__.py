"""How cells are computed: the published loop, the exact fast engine, and what either will take."""
